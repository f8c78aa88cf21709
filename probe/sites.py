"""Where inside a block its states can be watched while it runs, without keeping them.

Eight sites, in the order of arXiv 2405.16700: what enters the block (`in`), the normed input of its attention (`ln1`), what attention
adds (`attn`), the residual stream between (`mid`), the normed input of the feed-forward block (`ln2`), its inner activation
(`fc1`), what it adds (`mlp`), and what leaves the block (`out`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from probe.errors import EditError, did_you_mean
from probe.points import hook
from probe.subject import Subject

SITES = ("in", "ln1", "attn", "mid", "ln2", "fc1", "mlp", "out")
Take = Callable[[str, int, Tensor], None]
_POINTS = {"in": "resid_pre", "attn": "attn_out", "mlp": "mlp_out", "out": "resid_post"}


@contextmanager
def watching(subject: Subject, take: Take, sites: Sequence[str] = SITES) -> Iterator[None]:
    """While this is open, `take(site, layer, state)` sees the state (batch position width) of every site of every layer.

    A layer without attention has no `ln1`, `attn` and `mid`; one whose feed-forward block is no single chain of linear maps
    (experts) has no `fc1`: `missing` names them. Raises EditError for a site that does not exist.
    """
    for site in sites:
        if site not in SITES:
            raise EditError(f"there is no site {site!r}{did_you_mean(site, SITES)}")
    entered: dict[int, Tensor] = {}
    absent = missing(subject)
    with subject.lock, ExitStack() as stack:
        for layer in range(subject.n_layers):
            wanted = [site for site in sites if (site, layer) not in absent]
            for site in wanted:
                if site == "mid":
                    stack.callback(hook(subject, "resid_pre", layer, partial(_enter, entered, layer)).remove)
                    stack.callback(hook(subject, "attn_out", layer, partial(_between, entered, layer, take)).remove)
                elif site in _POINTS:
                    stack.callback(hook(subject, _POINTS[site], layer, partial(_see, site, layer, take)).remove)
                else:
                    module = _module(subject, site, layer)
                    assert module is not None
                    stack.callback(
                        module.register_forward_pre_hook(partial(_before, site, layer, take), with_kwargs=True).remove
                    )
        yield


def missing(subject: Subject) -> dict[tuple[str, int], str]:
    """The (site, layer) pairs that this model does not have, each with the reason."""
    found: dict[tuple[str, int], str] = {}
    for layer in range(subject.n_layers):
        if subject.anatomy.attention[layer] is None:
            found |= {(site, layer): "no softmax attention" for site in ("ln1", "attn", "mid")}
        elif subject.anatomy.cross[layer]:
            found["mid", layer] = "a gate between its cross-attention and the residual stream"
        if subject.anatomy.mlp[layer] is None:
            found |= {(site, layer): "no feed-forward block of its own" for site in ("ln2", "fc1", "mlp")}
        elif _module(subject, "fc1", layer) is None:
            found["fc1", layer] = "no single inner activation"
    return found


def _module(subject: Subject, site: str, layer: int) -> nn.Module | None:
    """The module whose input a site is."""
    block = subject.layers[layer]
    if site == "ln1":
        return block.get_submodule(subject.anatomy.attention[layer] or "")
    mlp = block.get_submodule(subject.anatomy.mlp[layer] or "")
    if site == "ln2":
        return mlp
    width = subject.config.get_text_config().hidden_size
    back = [m for m in mlp.modules() if isinstance(m, nn.Linear) and m.out_features == width and m.in_features != width]
    return back[0] if len(back) == 1 else None


def _see(site: str, layer: int, take: Take, state: Tensor) -> None:
    take(site, layer, state.detach())


def _enter(entered: dict[int, Tensor], layer: int, state: Tensor) -> None:
    entered[layer] = state.detach()


def _between(entered: dict[int, Tensor], layer: int, take: Take, added: Tensor) -> None:
    take(
        "mid", layer, entered.pop(layer).to(added.device) + added.detach()
    )  # a layer on a device of its own moves its input itself


def _before(site: str, layer: int, take: Take, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    take(site, layer, (args[0] if args else kwargs["hidden_states"]).detach())
