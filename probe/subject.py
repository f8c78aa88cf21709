"""Subject: a model under study, its processor, and its anatomy."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel

from probe.anatomy import Anatomy, Check, Row, resolve, row_of, verify
from probe.errors import ExampleError
from probe.example import Example
from probe.frames import FRAMES, Filmed, joined
from probe.geometry import GEOMETRIES, SOUND_GEOMETRIES
from probe.loading import demo_folder, load_model, load_processor, refuse_near_demo
from probe.mapping import Medium, Rendered, build_map
from probe.media import Clip, Wave, open_picture, open_sound, open_video
from probe.prompts import marks_of, render
from probe.tokens import TokenMap

Side = Literal["left", "right"]


@dataclass(frozen=True)
class Encoded:
    """A padded batch: what the model is called with, and the token map of each row."""

    inputs: dict[str, Any]
    maps: tuple[TokenMap, ...]
    examples: tuple[Example, ...]
    notes: tuple[str, ...] = ()  # what was done to the media on the way, for people to know

    def __len__(self) -> int:
        return len(self.maps)

    @property
    def last(self) -> Tensor:
        """The last input position of each row (batch)."""
        return torch.tensor([token_map.last for token_map in self.maps])

    def with_maps(self, maps: Sequence[TokenMap]) -> "Encoded":
        """The same batch with other maps: more named groups, say."""
        return replace(self, maps=tuple(maps))


@dataclass(frozen=True)
class Opened:
    """One example's media, decoded."""

    pictures: list[Image.Image]
    videos: list[Clip]
    sounds: list[Wave]
    notes: tuple[str, ...]


_LOCKS: WeakKeyDictionary[PreTrainedModel, threading.RLock] = WeakKeyDictionary()


@dataclass(eq=False)
class Subject:
    """A loaded model with its processor and anatomy. Sightline attaches to it and detaches without a trace."""

    model: PreTrainedModel
    processor: Any
    anatomy: Anatomy
    name: str = "in memory"
    checks: tuple[Check, ...] = ()

    def __post_init__(self) -> None:
        # Two Subjects of one model share its lock: a pass of one must not see the hooks of the other.
        self.lock = _LOCKS.setdefault(self.model, threading.RLock())

    @property
    def tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def n_layers(self) -> int:
        return self.anatomy.n_layers

    @cached_property
    def n_heads(self) -> int:
        return int(self.config.get_text_config().num_attention_heads)

    @cached_property
    def vocabulary(self) -> int:
        """How many logits the unembedding makes."""
        return int(self.unembedding.get_parameter("weight").shape[0])

    @property
    def layers(self) -> nn.ModuleList:
        found: nn.ModuleList = self.model.get_submodule(self.anatomy.layers)
        return found

    @property
    def decoder(self) -> PreTrainedModel:
        return self.model.get_submodule(self.anatomy.decoder)

    @property
    def final_norm(self) -> nn.Module:
        return self.model.get_submodule(self.anatomy.final_norm)

    @property
    def unembedding(self) -> nn.Module:
        return self.model.get_submodule(self.anatomy.unembedding)

    @property
    def embedding(self) -> nn.Module:
        return self.model.get_submodule(self.anatomy.embedding)

    @property
    def device(self) -> torch.device:
        """Where the inputs go: the device of the token embedding."""
        return next(self.embedding.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.embedding.parameters()).dtype

    # --- putting examples to the model ---

    def render(self, example: Example) -> Rendered:
        """The prompt as the model will read it, before placeholders grow, and which characters are which segment.

        Raises ExampleError when media and their places in the prompt do not match, or a text-only model is shown a
        picture.
        """
        return render(self.name, self.processor, self.anatomy, self.marks, example)

    @cached_property
    def marks(self) -> dict[str, str]:
        """The text that stands for a picture (`image`), a video and a sound (`audio`) in a prompt."""
        return marks_of(self.processor, self.anatomy)

    def encode(self, examples: Example | Sequence[Example], padding: Side = "left") -> Encoded:
        """One padded batch from examples that all come with the same kinds of media, or all with none.

        Tensors are on the model's device, floating ones in its dtype. Raises ExampleError for a medium that cannot be
        opened and TokenError where positions and media do not fit.
        """
        batch = (examples,) if isinstance(examples, Example) else tuple(examples)
        if len({tuple(map(bool, example.media.values())) for example in batch}) > 1:
            raise ExampleError("a batch holds examples with pictures and examples without: encode them apart")
        rendered = [self.render(example) for example in batch]
        opened = [self.open_media(example) for example in batch]
        filmed = [[self._film(clip) for clip in one.videos] for one in opened]
        inputs = self._process([r.text for r in rendered], opened, filmed, padding)
        maps = self._maps(rendered, opened, filmed, inputs)
        placed = {key: self._place(value) for key, value in inputs.items()}
        return Encoded(placed, maps, batch, tuple(note for one in opened for note in one.notes))

    def open_media(self, example: Example) -> Opened:
        """The example's pictures, videos and sounds, decoded; sounds at the sampling rate that the model wants.

        Raises ExampleError for a medium that cannot be opened.
        """
        sounds = [open_sound(sound) for sound in example.sounds]
        rate = self.processor.feature_extractor.sampling_rate if sounds else 0
        notes = tuple(
            f"sound {i} of example {example.id!r} was resampled from {sound.rate} to {rate} Hz"
            for i, sound in enumerate(sounds) if sound.rate != rate
        )  # fmt: skip
        return Opened(
            [open_picture(picture) for picture in example.images],
            [open_video(video) for video in example.videos],
            [sound.at(rate) for sound in sounds],
            notes,
        )

    def _film(self, clip: Clip) -> Filmed:
        return FRAMES[self.anatomy.row.videos or ""](clip, self.processor, self.config)

    def _process(self, texts: list[str], opened: list[Opened], filmed: list[list[Filmed]], padding: Side) -> dict[str, Any]:
        films = [film for one in filmed for film in one]
        if films:  # the runs of clips are written out here; the processor sees nothing but tokens
            texts = [_grown(text, self.marks["video"], one) for text, one in zip(texts, filmed, strict=True)]
        if len(texts) > 1 and self.tokenizer.pad_token is None:
            raise ExampleError(f"the tokenizer of {self.name} has no pad token: put examples to it one at a time (--batch 1)")
        options: dict[str, Any] = {
            "padding": len(texts) > 1, "padding_side": padding, "return_tensors": "pt",
            "add_special_tokens": self._adds_special(texts[0]),
        }  # fmt: skip
        pictures = [one.pictures for one in opened]
        if any(pictures):
            flat = self.anatomy.row.places == "unmarked"
            options["images"] = [picture for one in pictures for picture in one] if flat else pictures
        if sounds := [sound for one in opened for sound in one.sounds]:
            options |= {"audio": [sound.samples for sound in sounds], "sampling_rate": sounds[0].rate}
        if "qwen" in self.anatomy.model_type and any(pictures):
            options["return_mm_token_type_ids"] = True
        shown = any(one.pictures or one.sounds for one in opened)
        if self.anatomy.row.always_shown and not any(pictures):
            raise ExampleError(f"a {self.anatomy.family} model cannot be asked anything without a picture")
        try:
            made = self.processor(text=texts, **options) if shown else self.tokenizer(texts, **options)
        except (ImportError, ValueError, TypeError) as error:
            raise ExampleError(f"the processor of {self.name} refuses these examples: {error}") from error
        known = signature(self.model.forward).parameters
        if films:
            made |= {name: value for name, value in joined(films).items() if name in known}
            if "mm_token_type_ids" in known:  # 0 text, 1 picture, 2 video
                kinds = made.get("mm_token_type_ids", torch.zeros_like(made["input_ids"]))
                made["mm_token_type_ids"] = kinds.masked_fill(made["input_ids"] == self.anatomy.video_token_id, 2)
        unwanted = {"labels"} | ({"token_type_ids", "num_audio_tokens", "mm_token_type_ids"} - known.keys())
        inputs = {key: value for key, value in made.items() if key not in unwanted}
        if self.anatomy.row.places == "unmarked":  # BLIP's processors put the picture before the padding
            _pack(inputs, "input_ids", "attention_mask", padding)
        if "qformer_input_ids" in inputs:  # a Q-Former counts positions from the row's start
            _pack(inputs, "qformer_input_ids", "qformer_attention_mask", "right")
        return inputs

    def _adds_special(self, text: str) -> bool:
        bos = getattr(self.tokenizer, "bos_token", None)
        return not (bos and text.startswith(bos))

    def _maps(
        self, rendered: list[Rendered], opened: list[Opened], filmed: list[list[Filmed]], inputs: dict[str, Any]
    ) -> tuple[TokenMap, ...]:
        ids = [self.tokenizer.convert_tokens_to_ids(mark) for mark in self.marks.values()]
        special = self._adds_special(rendered[0].text)
        maps, seen = [], {"image": 0, "video": 0, "audio": 0}
        for row, (text, one, films) in enumerate(zip(rendered, opened, filmed, strict=True)):
            kept = inputs["attention_mask"][row].bool()
            tokens = inputs["input_ids"][row][kept].tolist()
            plain = self.tokenizer(text.text, return_offsets_mapping=True, add_special_tokens=special)
            made = build_map(
                tokens, [self.tokenizer.decode([token]) for token in tokens], text, plain["input_ids"],
                plain["offset_mapping"], frozenset(ids), self.tokenizer.bos_token_id, self._media(one, films, inputs, seen),
            )  # fmt: skip
            maps.append(made.spread(np.nonzero(kept.numpy())[0], len(kept)))
        longest = max(len(made.crossed or ()) for made in maps)  # an example with fewer pictures has padding for keys
        return tuple(
            replace(made, crossed=made.crossed.spread(np.arange(len(made.crossed)), longest)) if made.crossed else made
            for made in maps
        )

    def _media(self, opened: Opened, films: list[Filmed], inputs: dict[str, Any], seen: dict[str, int]) -> list[Medium]:
        """The example's media with their layouts; `seen` counts those of the batch so far."""
        anatomy, row = self.anatomy, self.anatomy.row
        pictures, sounds = GEOMETRIES.get(row.geometry or ""), SOUND_GEOMETRIES.get(row.sounds or "")
        media = []
        for image in opened.pictures:
            size = (image.height, image.width)
            layout = pictures(size, seen["image"], inputs, self.processor, self.config) if pictures else None
            media.append(Medium("image", anatomy.image_token_id, layout, image.size))
            seen["image"] += 1
        media += [Medium("video", anatomy.video_token_id, film.layout) for film in films]
        for sound in opened.sounds:
            layout = sounds(sound.seconds, seen["audio"], inputs, self.processor, self.config) if sounds else None
            media.append(Medium("audio", anatomy.audio_token_id, layout))
            seen["audio"] += 1
        return media

    def _place(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.to(self.device)
        return value.to(self.dtype) if value.is_floating_point() else value

    # --- what it says ---

    @torch.no_grad()
    def generate(self, examples: Example | Sequence[Example] | Encoded, max_new_tokens: int = 16) -> list[str]:
        """Greedy answers, stripped, special tokens left out. An encoded batch must be padded on the left."""
        encoded = examples if isinstance(examples, Encoded) else self.encode(examples, padding="left")
        if any(token_map.last != len(token_map) - 1 for token_map in encoded.maps):
            raise ExampleError('answers are generated from batches padded on the left: encode(examples, padding="left")')
        with self.lock:
            made = self.model.generate(**encoded.inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new = made[:, encoded.inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]

    def first_tokens(self, words: Sequence[str], example: Example) -> list[int]:
        """The id of the first token of each word where the answer to this example would begin.

        A word follows a space unless the prompt already ends in white space or a special token, as answers do; a token
        that is only the mark of a space is passed over.
        """
        text = self.render(example).text
        begin = not text[-1:].isspace() and not text.endswith(tuple(self.tokenizer.all_special_tokens))
        base = self.tokenizer.encode(text, add_special_tokens=False)
        found = []
        for word in words:
            whole = self.tokenizer.encode(f"{text}{' ' if begin else ''}{word}", add_special_tokens=False)
            start = next((i for i, (a, b) in enumerate(zip(base, whole, strict=False)) if a != b), len(base))
            new = [token for token in whole[start:] if self.tokenizer.decode([token]).strip()]
            found.append(int((new or whole[-1:])[0]))
        return found

    def without_media(self, example: Example) -> Example:
        """The same question with nothing to look at or listen to, and no place left for it in the prompt."""
        blind = example.without_media()
        texts = {name: getattr(blind, name) for name in ("prompt", "context", "options", "suffix")}
        for mark in self.marks.values():
            texts = {name: text.replace(mark, "").strip() for name, text in texts.items()}
        return replace(blind, **texts)


def _grown(text: str, mark: str, films: list[Filmed]) -> str:
    """A prompt with each video's mark written as often as its run is long."""
    pieces = text.split(mark)
    return "".join(piece + mark * film.layout.length for piece, film in zip(pieces, films, strict=False)) + pieces[-1]


def _pack(inputs: dict[str, Any], ids: str, mask: str, side: Side) -> None:
    """Moves all padding to one side, in place: what stands between two parts of a row changes their distance."""
    order = inputs[mask].argsort(dim=1, descending=side == "right", stable=True)
    inputs[ids], inputs[mask] = inputs[ids].gather(1, order), inputs[mask].gather(1, order)


def load(
    source: str | Path | tuple[PreTrainedModel, Any],
    dtype: torch.dtype | str | None = None,
    device: str | None = None,
    device_map: Any = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    row: Row | None = None,
    check: bool = True,
) -> Subject:
    """Open a model: `demo`, `demo:NAME`, a folder, a hub id, or a (model, processor) pair that is already in memory.

    `dtype` defaults to bfloat16 on a GPU and float32 on a CPU; `device` to the GPU where there is one. `row` overrides
    the family's row. With `check`, the anatomy is verified by experiment.

    Raises LoadError when the weights cannot be opened and AnatomyError when the architecture is not understood.
    """
    if isinstance(source, tuple):
        model, processor = source
        name = type(model).__name__
        model.eval()
    else:
        name = str(source)
        path = demo_folder(name) if name.split(":")[0] == "demo" else name
        refuse_near_demo(path)
        target = device or ("cuda" if torch.cuda.is_available() else "cpu")
        chosen = dtype or (torch.bfloat16 if target.startswith("cuda") else torch.float32)
        model = load_model(path, chosen, device_map, trust_remote_code, revision)
        processor = load_processor(path, trust_remote_code, revision, bool((row or row_of(model.config)).needs))
        if device_map is None:
            model.to(target)
    subject = Subject(model, processor, resolve(model, row), name)
    if check:
        subject.checks = verify(model, subject.anatomy, _specimen(subject))
    return subject


def _specimen(subject: Subject) -> dict[str, Any]:
    """What the checks are run on: a question with a picture and a sound of noise where the model takes them."""
    noise = np.random.default_rng(0)
    example = Example(
        "specimen", "what is this ?",
        (Image.fromarray(noise.integers(0, 255, (64, 64, 3), dtype=np.uint8)),) if "image" in subject.marks else (),
        sounds=((noise.normal(0, 0.1, 16_000).astype(np.float32), 16_000),) if "audio" in subject.marks else (),
    )  # fmt: skip
    lead = "".join(subject.marks[kind] for kind, shown in example.media.items() for _ in shown)
    chat = any(getattr(owner, "chat_template", None) for owner in (subject.processor, subject.tokenizer))
    if not chat and subject.anatomy.row.places == "marked":
        example = replace(example, prompt=f"{lead} {example.prompt}")
    return subject.encode(example).inputs
