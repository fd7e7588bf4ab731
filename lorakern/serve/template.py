"""Chat messages to the tokens that a model reads."""

from collections.abc import Callable
from typing import Any

from lorakern.errors import LorakernError

# SmolLM2's own, without the system prompt that it puts before a conversation that has none: the shipped skills were
# trained without one
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

Template = Callable[[list[dict[str, str]]], list[int]]


def chat_template(tokenizer: Any, template: str | None = None) -> Template:
    """A function from messages {"role", "content"} to token ids.

    Args:
        tokenizer: one of transformers.
        template: in Jinja; None for the tokenizer's own.
    """

    def encode(messages: list[dict[str, str]]) -> list[int]:
        if template is None and not tokenizer.chat_template:
            raise LorakernError("this model's tokenizer has no chat template; send the prompt to /v1/completions")
        try:
            text = tokenizer.apply_chat_template(
                messages, chat_template=template, add_generation_prompt=True, tokenize=False
            )
        except Exception as error:
            # templates refuse by raising what they like
            raise LorakernError(f"messages: the model's chat template refuses them ({error})") from None
        # the template has the beginning of the text in it
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    return encode
