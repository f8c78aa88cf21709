"""From a last hidden state to logits, as the model does it."""

from typing import Any

import torch
from torch import Tensor


def capped(logits: Tensor, config: Any) -> Tensor:
    """Logits under the final soft cap, where a family has one: cap * tanh(logits / cap) (Gemma 2, arXiv 2408.00118)."""
    cap = getattr(config.get_text_config(), "final_logit_softcapping", None)
    return cap * torch.tanh(logits / cap) if cap else logits
