"""What every test with an engine needs: the model and the prompts of the skills."""

import json

import pytest
from engines import SKILLS, model_folder


@pytest.fixture(scope="session")
def model():
    """SmolLM2 as a directory of Hugging Face files, kept in build/."""
    return model_folder()


@pytest.fixture(scope="session")
def prompts():
    """By skill, as the model reads them."""
    asked = json.loads((SKILLS / "prompts.json").read_text())
    return {skill: [item["prompt"] for item in items] for skill, items in asked.items()}
