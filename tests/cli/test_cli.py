"""The command line against a model that is not there: what is parsed, printed and returned."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from minillm import cli, cli_bench, terminal
from minillm.config import EngineConfig
from minillm.errors import ConfigError, RequestError
from minillm.options import field_docs
from minillm.types import (
    CompletionOutput,
    FinishReason,
    RequestOutput,
    SamplingParams,
    StructuredOutputsParams,
    Timings,
)


class FakeLLM:
    """Answers `echo: ` and the question, a word at a time; it keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.params: list[SamplingParams] = []
        self.tokenizer = SimpleNamespace(has_chat_template=True)
        self.failure: Exception | None = None
        self.interrupts = False

    def stream(self, prompt: Any, params: SamplingParams) -> Iterator[SimpleNamespace]:
        self.asked.append(list(prompt) if isinstance(prompt, list) else prompt)
        self.params.append(params)
        if self.failure is not None:
            raise self.failure
        question = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        words = ["echo: ", question]
        for number, word in enumerate(words, 1):
            if self.interrupts:
                signal.raise_signal(signal.SIGINT)
            output = finished("".join(words)) if number == len(words) else None
            yield SimpleNamespace(text=word, output=output)


def finished(text: str) -> RequestOutput:
    """An output with four tokens at 0.5, 0.6, 0.7 and 1.0 s."""
    timings = Timings(token_times=[0.5, 0.6, 0.7, 1.0], finished=1.0, num_prompt_tokens=18, num_cached_tokens=16)
    reason = FinishReason.STOP
    completion = CompletionOutput(index=0, text=text, token_ids=[1, 2, 3, 4], finish_reason=reason)
    return RequestOutput(
        request_id="0",
        prompt_token_ids=[],
        text=text,
        token_ids=[1, 2, 3, 4],
        finish_reason=reason,
        timings=timings,
        completions=[completion],
    )


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> FakeLLM:
    """The model that commands open, with the name and options that they opened it with."""
    fake = FakeLLM()

    @contextmanager
    def open_fake(name: str, engine: EngineConfig) -> Iterator[FakeLLM]:
        fake.opened = (name, engine)  # type: ignore[attr-defined]
        yield fake

    monkeypatch.setattr(cli, "open_model", open_fake)
    return fake


def run(monkeypatch: pytest.MonkeyPatch, *argv: str) -> int:
    """Exit status of `minillm argv`."""
    monkeypatch.setattr(sys, "argv", ["minillm", *argv])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    """Let the user type these lines, then Ctrl-D."""
    left = list(lines)

    def read(_: str) -> str:
        if not left:
            raise EOFError
        return left.pop(0)

    monkeypatch.setattr("builtins.input", read)


def test_generate_prints_the_answer_and_the_closing_line(
    llm: FakeLLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "generate", "Why?") == 0
    out, err = capsys.readouterr()
    assert out == "echo: Why?\n"
    assert err == (
        "18 prompt tokens, 16 cached · TTFT 500 ms · ITL median 100 ms, p99 300 ms · 4 tokens · 4.0 tokens/s\n"
    )
    assert llm.asked == [[{"role": "user", "content": "Why?"}]]
    assert llm.params == [SamplingParams(temperature=0.0)]
    assert llm.opened == ("smollm2", EngineConfig())  # type: ignore[attr-defined]


def test_raw_or_no_template_continues_the_text(llm: FakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, "generate", "--raw", "Once") == 0
    llm.tokenizer.has_chat_template = False
    assert run(monkeypatch, "generate", "upon") == 0
    assert llm.asked == ["Once", "upon"]


def test_options_reach_the_configs(llm: FakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = "--max-tokens 7 --temperature 0.5 --top-k 3 --top-p 0.9 --min-p 0.1 --seed 5 --stop a --stop b"
    engine = "--model x --dtype float32 --max-model-len 64 --no-overlap --no-enable-prefix-caching --block-size 32"
    assert run(monkeypatch, "generate", "Q", *sampling.split(), "--stop-token-ids", "9", *engine.split()) == 0
    assert llm.params == [
        SamplingParams(
            max_tokens=7, temperature=0.5, top_k=3, top_p=0.9, min_p=0.1, seed=5, stop=["a", "b"], stop_token_ids=[9]
        )
    ]
    config = EngineConfig(dtype="float32", max_model_len=64, overlap=False, enable_prefix_caching=False, block_size=32)
    assert llm.opened == ("x", config)  # type: ignore[attr-defined]


def test_a_dict_is_given_as_token_and_number(llm: FakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ["--logit-bias", "50=-100", "--logit-bias", "7=1.5", "--bad-words", "rain", "--allowed-token-ids", "3"]
    assert run(monkeypatch, "generate", "Q", *argv) == 0
    expected = {"logit_bias": {50: -100.0, 7: 1.5}, "bad_words": ["rain"], "allowed_token_ids": [3]}
    assert llm.params == [SamplingParams(temperature=0.0, **expected)]  # type: ignore[arg-type]


def test_structured_output_is_asked_for_by_its_own_options(llm: FakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, "generate", "Q", "--choice", "yes", "--choice", "no") == 0
    assert run(monkeypatch, "generate", "Q", "--json", '{"type": "object"}') == 0
    assert run(monkeypatch, "generate", "Q", "--json-object", "--regex", "a") == 2
    expected = (StructuredOutputsParams(choice=["yes", "no"]), StructuredOutputsParams(json='{"type": "object"}'))
    assert [params.structured_outputs for params in llm.params] == list(expected)


@pytest.mark.parametrize("config", [EngineConfig, SamplingParams, StructuredOutputsParams])
def test_every_field_has_help(config: type) -> None:
    docs = field_docs(config)
    assert list(docs) == [field.name for field in fields(config)]
    assert all(docs.values())


def test_prompt_from_standard_input(llm: FakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(read=lambda: "from a pipe"))
    assert run(monkeypatch, "generate", "--raw", "-") == 0
    assert llm.asked == ["from a pipe"]


def test_bytes_that_are_no_text_end_nothing(llm: FakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal of UTF-8 is strict about what it reads, one of ASCII about what it prints."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hi\xff"), "utf-8"))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii"))
    assert run(monkeypatch, "generate", "--raw", "-") == 0
    assert run(monkeypatch, "generate", "日本") == 0
    assert written.getvalue() == b"echo: hi?\necho: ??\n"
    assert llm.asked[0] == "hi\udcff"


@pytest.mark.parametrize(
    "argv",
    [
        ["offline", "--repeats", "0"],
        ["speculation", "--batch-size", "0"],
        ["speculation", "--repeats", "-1"],
        ["lossless", "--num-draws", "0"],
        ["company", "--num-rows", "0"],
        ["company", "--input-len", "0"],
    ],
)
def test_benchmarks_of_nothing_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], argv: list[str]
) -> None:
    monkeypatch.setattr(cli_bench, "prepare", lambda _: pytest.fail("it began"))
    assert run(monkeypatch, "bench", *argv) == 2
    assert f"Invalid value for '{argv[1]}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["generate", "Q", "--temperature", "-1"], "minillm: temperature must be a number in [0.0, 100.0], not -1.0\n"),
        (
            ["generate", "Q", "--logit-bias", "a=b"],
            "minillm: logit_bias must be given as TOKEN=NUMBER, such as 50=-1.5, not 'a=b'\n",
        ),
        (["generate", "Q", "--block-size", "17"], "minillm: block_size must be one of (16, 32, 64, 128), not 17\n"),
    ],
)
def test_bad_values_are_one_line_and_status_2(
    llm: FakeLLM,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    message: str,
) -> None:
    assert run(monkeypatch, *argv) == 2
    assert capsys.readouterr() == ("", message)
    assert llm.asked == []


@pytest.mark.parametrize("failure", [RequestError("the prompt is empty"), ConfigError("no such dtype")])
def test_errors_of_the_engine_are_one_line_and_status_2(
    llm: FakeLLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], failure: Exception
) -> None:
    llm.failure = failure
    assert run(monkeypatch, "generate", "Q") == 2
    assert capsys.readouterr().err == f"minillm: {failure}\n"


def test_our_own_mistakes_keep_their_traceback(llm: FakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    llm.failure = AssertionError("an invariant")
    monkeypatch.setattr(sys, "argv", ["minillm", "generate", "Q"])
    with pytest.raises(AssertionError, match="an invariant"):
        cli.main()


def test_unknown_options_and_commands_are_status_2(llm: FakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, "generate", "Q", "--made-up") == 2
    assert run(monkeypatch, "made-up") == 2
    assert run(monkeypatch, "generate", "Q", "--max-tokens", "many") == 2
    assert llm.asked == []


def test_ctrl_c_is_quiet_and_status_130(
    llm: FakeLLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    llm.interrupts = True
    assert run(monkeypatch, "generate", "Q") == 130
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err and err.strip() == ""


def test_chat_keeps_the_turns(llm: FakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    typed(monkeypatch, "one", "", "  two ", "/clear", "three", "/quit", "never")
    assert run(monkeypatch, "chat", "--system", "Be brief.") == 0
    system, one = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "one"}
    answer, two = {"role": "assistant", "content": "echo: one"}, {"role": "user", "content": "two"}
    assert llm.asked == [[system, one], [system, one, answer, two], [system, {"role": "user", "content": "three"}]]


def test_chat_ends_at_the_end_of_input(llm: FakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    typed(monkeypatch)
    assert run(monkeypatch, "chat") == 0
    assert llm.asked == []


def test_chat_goes_on_after_a_refused_question(
    llm: FakeLLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    llm.failure = RequestError("the prompt has 9 tokens; at most 8 fit")
    typed(monkeypatch, "long", "again")
    assert run(monkeypatch, "chat") == 0
    assert [len(messages) for messages in llm.asked] == [1, 1]
    assert "at most 8 fit (/clear forgets what was said)" in capsys.readouterr().err


def test_ctrl_c_stops_an_answer_and_not_the_chat(llm: FakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    llm.interrupts = True
    typed(monkeypatch, "one", "two")
    assert run(monkeypatch, "chat") == 0
    assert llm.asked == [[{"role": "user", "content": "one"}], [{"role": "user", "content": "two"}]]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_python_m_minillm_shows_the_version() -> None:
    result = subprocess.run([sys.executable, "-m", "minillm", "--version"], capture_output=True, text=True, check=True)
    assert result.stdout == "0.1.0\n"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.0, "0 ms"), (0.00012, "0.12 ms"), (0.1 - 1e-17, "100 ms"), (0.01234, "12.3 ms"), (1.5, "1500 ms")],
)
def test_milliseconds(seconds: float, shown: str) -> None:
    assert terminal.milliseconds(seconds) == shown


def test_fetching_shows_a_bar_only_when_there_is_something_to_fetch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from minillm.model import sources

    monkeypatch.setattr(sources, "pull", lambda name, progress, verify: Path(name) if verify else None)
    assert run(monkeypatch, "pull", "there") == 0
    assert capsys.readouterr() == ("there\n", "")

    def pull(name: str, progress: Callable[[int, int], None], verify: bool) -> Path:
        progress(1, 2)
        progress(2, 2)
        return Path(name)

    monkeypatch.setattr(sources, "pull", pull)
    assert run(monkeypatch, "pull", "away") == 0
    out, err = capsys.readouterr()
    assert out == "away\n" and "fetching away" in err
