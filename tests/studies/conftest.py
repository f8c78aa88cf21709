"""A small LLaVA that reads the demo's prompts, with random weights: it runs like the demo and knows nothing."""

import pytest
import torch
import transformers

from studies.demo import build


@pytest.fixture(scope="session")
def stranger(tmp_path_factory):
    """The folder of an untrained demo model, eight layers."""
    transformers.logging.set_verbosity_error()
    processor = build.processor()
    torch.manual_seed(0)
    model = build.llava(len(processor.tokenizer), processor.tokenizer.image_token_id)
    folder = tmp_path_factory.mktemp("stranger")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
