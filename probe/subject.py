"""Subject: a model under study, its processor, and its anatomy."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from jinja2 import TemplateError
from torch import Tensor, nn
from transformers import PreTrainedModel

from probe.anatomy import Anatomy, Check, Row, resolve, verify
from probe.errors import ExampleError, LoadError
from probe.example import Example, open_picture
from probe.geometry import GEOMETRIES, Layout
from probe.loading import load_model, load_processor
from probe.tokens import Rendered, TokenMap, build_map

Side = Literal["left", "right"]
_CONTROLS = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclass(frozen=True)
class Encoded:
    """A padded batch: what the model is called with, and the token map of each row."""

    inputs: dict[str, Any]
    maps: tuple[TokenMap, ...]
    examples: tuple[Example, ...]

    def __len__(self) -> int:
        return len(self.maps)

    @property
    def last(self) -> Tensor:
        """The last input position of each row (batch)."""
        return torch.tensor([token_map.last for token_map in self.maps])

    def with_maps(self, maps: Sequence[TokenMap]) -> "Encoded":
        """The same batch with other maps: more named groups, say."""
        return replace(self, maps=tuple(maps))


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

        Raises ExampleError when the pictures and their places in the prompt do not match, or a text-only model is
        shown a picture.
        """
        if example.images and self.anatomy.vision is None:
            raise ExampleError(
                f"{self.name} is a text-only model ({self.anatomy.model_type}): example {example.id!r} shows it "
                f"{len(example.images)} picture(s), which it has no way to see"
            )
        template = getattr(self.processor, "chat_template", None) or getattr(self.tokenizer, "chat_template", None)
        body = "\n".join(part for part in (example.context, example.prompt, example.options, example.suffix) if part)
        mark = self.placeholder
        places = body.count(mark) if mark else 0
        if places and places != len(example.images):
            raise ExampleError(
                f"the prompt of example {example.id!r} has {places} places for pictures ({mark}) but {len(example.images)} "
                f"picture(s) came with it"
            )
        if not template:
            if example.images and not places:
                raise ExampleError(
                    f"the prompt of example {example.id!r} has no place for its picture, and the model no chat template "
                    f"to make one: write {mark} where the picture belongs"
                )
            return _located(body, example, mark, chat=False)
        content: Any = [] if places else [{"type": "image"} for _ in example.images]
        for number, piece in enumerate(body.split(mark) if places and mark else [body]):
            content += [{"type": "image"}] if number else []
            content += [{"type": "text", "text": piece}] if piece.strip() else []
        system: Any = [{"type": "text", "text": example.system}]
        if self.anatomy.vision is None:  # templates of text-only models expect plain strings
            content, system = body, example.system
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if example.system is not None:
            messages.insert(0, {"role": "system", "content": system})
        owner = self.processor if getattr(self.processor, "chat_template", None) else self.tokenizer
        try:
            text = owner.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise ExampleError(f"the chat template of {self.name} refuses example {example.id!r}: {error}") from error
        if mark and text.count(mark) != len(example.images):
            raise ExampleError(
                f"the chat template of {self.name} made {text.count(mark)} places for the {len(example.images)} picture(s) of "
                f"example {example.id!r}: write {mark} in the prompt where each belongs"
            )
        return _located(text, example, mark, chat=True)

    @cached_property
    def placeholder(self) -> str | None:
        """The text that stands for a picture in a prompt."""
        for name in ("image_token", "boi_token"):
            token = getattr(self.processor, name, None)
            if token is not None and self.anatomy.vision is not None:
                return str(token)
        if self.anatomy.image_token_id is None:
            return None
        return str(self.tokenizer.convert_ids_to_tokens(self.anatomy.image_token_id))

    def encode(self, examples: Example | Sequence[Example], padding: Side = "left") -> Encoded:
        """One padded batch from examples that all have pictures, or all have none.

        Tensors are on the model's device, floating ones in its dtype. Raises ExampleError for a picture that cannot be
        opened and TokenError where positions and pictures do not fit.
        """
        batch = (examples,) if isinstance(examples, Example) else tuple(examples)
        if len({bool(example.images) for example in batch}) > 1:
            raise ExampleError("a batch holds examples with pictures and examples without: encode them apart")
        rendered = [self.render(example) for example in batch]
        pictures = [[open_picture(picture) for picture in example.images] for example in batch]
        inputs = self._process([r.text for r in rendered], pictures, padding)
        maps = self._maps(batch, rendered, pictures, inputs, padding)
        placed = {key: self._place(value) for key, value in inputs.items()}
        return Encoded(placed, maps, batch)

    def _process(self, texts: list[str], pictures: list[list[Any]], padding: Side) -> dict[str, Any]:
        bos = getattr(self.tokenizer, "bos_token", None)
        if len(texts) > 1 and self.tokenizer.pad_token is None:
            raise ExampleError(f"the tokenizer of {self.name} has no pad token: put examples to it one at a time (--batch 1)")
        options: dict[str, Any] = {
            "padding": len(texts) > 1, "padding_side": padding, "return_tensors": "pt",
            "add_special_tokens": not (bos and texts[0].startswith(bos)),
        }  # fmt: skip
        if any(pictures):
            options["images"] = pictures
            if "qwen" in self.anatomy.model_type:
                options["return_mm_token_type_ids"] = True
        made = self.processor(text=texts, **options)
        known = signature(self.model.forward).parameters
        unwanted = {"labels"} | ({"token_type_ids"} - known.keys())
        return {key: value for key, value in made.items() if key not in unwanted}

    def _maps(
        self,
        batch: tuple[Example, ...],
        rendered: list[Rendered],
        pictures: list[list[Any]],
        inputs: dict[str, Any],
        side: Side,
    ) -> tuple[TokenMap, ...]:
        geometry = GEOMETRIES.get(self.anatomy.row.geometry or "")
        special = not (self.tokenizer.bos_token and rendered[0].text.startswith(self.tokenizer.bos_token))
        maps, seen = [], 0
        for row, (text, shown) in enumerate(zip(rendered, pictures, strict=True)):
            kept = inputs["attention_mask"][row].bool()
            tokens = inputs["input_ids"][row][kept].tolist()
            plain = self.tokenizer(text.text, return_offsets_mapping=True, add_special_tokens=special)
            layouts: list[Layout] | None = None
            if geometry is not None:
                layouts = [
                    geometry((image.height, image.width), seen + i, inputs, self.processor, self.config)
                    for i, image in enumerate(shown)
                ]
            seen += len(shown)
            spellings = [self.tokenizer.decode([token]) for token in tokens]
            made = build_map(
                tokens, spellings, text, plain["input_ids"], plain["offset_mapping"], self.anatomy.image_token_id,
                self.tokenizer.bos_token_id, layouts, [image.size for image in shown],
            )  # fmt: skip
            missing = len(kept) - len(tokens)
            maps.append(made.shifted(missing, 0) if side == "left" else made.shifted(0, missing))
        return tuple(maps)

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

    def without_images(self, example: Example) -> Example:
        """The same question with nothing to look at, and no place left for it in the prompt."""
        blind, mark = example.without_images(), self.placeholder
        if not mark:
            return blind
        texts = {name: getattr(blind, name).replace(mark, "").strip() for name in ("prompt", "context", "options", "suffix")}
        return replace(blind, **texts)


def _located(text: str, example: Example, mark: str | None, chat: bool) -> Rendered:
    """Finds the parts of the example in the rendered prompt, last occurrence first, since the template stands around them.

    A part with places for pictures inside it is found piece by piece. Raises ExampleError where a template rewrites a
    part, so that nobody knows which positions it has.
    """
    spans: list[tuple[str, int, int]] = []
    end, tail = len(text), 0
    parts = (
        ("suffix", example.suffix),
        ("options", example.options),
        ("question", example.prompt),
        ("context", example.context),
    )
    for name, part in parts:
        for piece in reversed(part.split(mark) if mark else [part]):
            piece = piece.strip()
            if not piece:
                continue
            start = text.rfind(piece, 0, end)
            if start < 0:
                raise ExampleError(
                    f"the chat template rewrites the {name} of example {example.id!r}: {piece[:60]!r} is not in the prompt"
                )
            spans.append((name, start, start + len(piece)))
            tail, end = max(tail, start + len(piece)), start
    if chat and tail < len(text):
        spans.append(("header", tail, len(text)))
    if chat:
        spans += _system(text, example, end)
    return Rendered(text, tuple(spans))


def _system(text: str, example: Example, end: int) -> list[tuple[str, int, int]]:
    """System words: those of the example, or whatever a template puts before the first turn by itself."""
    if example.system:
        start = text.find(example.system, 0, end)
        return [("system", start, start + len(example.system))] if start >= 0 else []
    return [("system", 0, _first_turn(text, end))]


def _first_turn(text: str, end: int) -> int:
    marks = [
        text.find(mark, 0, end)
        for mark in ("USER:", "<|im_start|>user", "[INST]", "<start_of_turn>user", "user\n", "User:", "<|user|>")
    ]
    found = [mark for mark in marks if mark >= 0]
    return min(found) if found else 0


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
        path = _demo_folder(name) if name.split(":")[0] == "demo" else name
        target = device or ("cuda" if torch.cuda.is_available() else "cpu")
        chosen = dtype or (torch.bfloat16 if target.startswith("cuda") else torch.float32)
        model = load_model(path, chosen, device_map, trust_remote_code, revision)
        processor = load_processor(path, trust_remote_code, revision)
        if device_map is None:
            model.to(target)
    subject = Subject(model, processor, resolve(model, row), name)
    if check:
        tokenizer = subject.tokenizer
        ids = torch.tensor([tokenizer.encode("what is this ?", add_special_tokens=True)], device=subject.device)
        subject.checks = verify(model, subject.anatomy, ids)
    return subject


def _demo_folder(name: str) -> str:
    from importlib.util import find_spec

    spec = find_spec("studies.demo")
    if spec is None or not spec.submodule_search_locations:
        raise LoadError("the demo models are part of the sightline distribution, which is not installed here")
    folder = Path(spec.submodule_search_locations[0]) / "checkpoints"
    model = name.partition(":")[2] or "joint"
    if not (folder / model / "config.json").is_file():
        known = sorted(path.parent.name for path in folder.glob("*/config.json"))
        shown = ", ".join(f"demo:{item}" if item != "joint" else "demo" for item in known)
        raise LoadError(f"there is no demo model {name!r} (there is {shown})")
    return str(folder / model)
