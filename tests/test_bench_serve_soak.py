"""The soak of `lorakern serve`: it finds answers that differ, and lost changes; its page."""

import os

import pytest

from benchmarks import machine
from benchmarks.serve_soak import Soak, page

WHOLE = {"requests": 60, "clients": 4}


class Client:
    """A server of which nothing is asked twice in vain."""

    def __init__(self):
        self.skills = {}

    def upload(self, name, skill, texts, replace=False):
        if name in self.skills and not replace:
            return 409
        self.skills[name] = skill
        return 201

    def status(self, method, path):
        del self.skills[path.removeprefix("/adapters/").replace("%20", " ")]
        return 204

    def whole(self, ask):
        if ask.model not in ("auto", "base", *self.skills):
            return 404, "there is no such model"
        said = self.skills.get(ask.model, ask.model)
        return f"{said}: {ask.messages}", "stop", 5, () if ask.model == "base" else ((ask.model, 1.0),)

    def streamed(self, ask, first=None, leave=False):
        answer = self.whole(ask)
        if first is not None:
            first.set()
        return () if leave else answer


class Liar(Client):
    """Says something else when it is asked again."""

    def __init__(self):
        super().__init__()
        self.asked = set()

    def whole(self, ask):
        answer = super().whole(ask)
        again, self.asked = ask in self.asked, self.asked | {ask}
        return (answer[0] + "!", *answer[1:]) if again and ask.model == "base" else answer


class Keeper(Client):
    """Does not let go of what was deleted."""

    def status(self, method, path):
        return 204


def test_an_honest_server_passes():
    soak = Soak(Client(), os.getpid(), seed=0)
    figures = soak.run(**WHOLE)
    assert soak.failures == [] and figures["equal"] + figures["left early"] == WHOLE["requests"]
    assert figures["deletions"] == figures["uploads"] == figures["replaced"] > 0
    text = page(figures, machine.describe("cpu"), ["--mode", "mixture"])
    assert "lorakern serve --mode mixture" in text and "| failures | 0 |" in text
    assert all(len(line) < 150 or "python" in line for line in text.splitlines())


@pytest.mark.parametrize("client, says", [(Liar, "alone"), (Keeper, "not 404")])
def test_what_is_wrong_is_found(client, says):
    soak = Soak(client(), os.getpid(), seed=0)
    soak.run(**WHOLE)
    assert any(says in failure for failure in soak.failures)
