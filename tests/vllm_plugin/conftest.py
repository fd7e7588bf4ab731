"""What every test with an engine needs: the model and the prompts of the skills."""

import json

import pytest
from engines import REPOSITORY, SKILLS

from lorakern.integrations import smollm2


@pytest.fixture(scope="session")
def model():
    """SmolLM2 as a directory of Hugging Face files, kept in build/."""
    folder = REPOSITORY / "build/smollm2"
    if not (folder / "tokenizer.json").is_file():
        weights, tokenizer = smollm2.load()
        weights.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def prompts():
    """By skill, as the model reads them."""
    asked = json.loads((SKILLS / "prompts.json").read_text())
    return {skill: [item["prompt"] for item in items] for skill, items in asked.items()}
