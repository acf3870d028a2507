"""``partwise serve``: what its arguments ask for."""

from __future__ import annotations

import functools
from typing import Any

from partwise.checks import InputError, check_choice
from partwise.commands import Command, Report, Write

USAGE = (
    ("serve generate", "write text with a key-value cache that never exceeds its budget"),
    ("serve compare", "what each method's cache costs in quality and saves in memory"),
    ("serve http", "an OpenAI-compatible server with a bounded cache for each conversation"),
)
EXAMPLES = ('partwise serve generate --model FOLDER --prompt "Once" --budget 256    write on, with at most 256 cached tokens in each layer and head',)
HELP = """\
usage: partwise serve generate --prompt TEXT [flags]
       partwise serve compare [flags]
       partwise serve http [flags]

A model that writes keeps the keys and values of every token it has seen, and this cache grows until the memory is full. Here it keeps at
most so many tokens per layer and head (--budget), however long the text gets. A method says which tokens leave.

METHOD (left out: {default})
{methods}

Without --model: the newest finished run of `partwise train` under runs/.

  partwise serve generate --model my/llama --prompt "def main("      writes on until the text ends, or 200 tokens are written
  partwise serve generate --prompt-file notes.txt --max-new-tokens 4000 --budget 512 > more.txt
  partwise serve generate --prompt "..." --bits 4                    each number in 4 bits instead of 16 or 32
  partwise serve generate --prompt "..." --pin-prompt                what is in the prompt is never forgotten
  partwise serve generate --prompt "..." --method h2o --recent 0.5   another method, with settings of its own
  partwise serve compare --model my/llama --text my/notes            all methods at budgets of 64, 128 and 256 tokens
  partwise serve compare --budgets 32,64 --methods scissorhands,h2o,streaming-llm --tokens 1024
  partwise serve http --model my/llama                               http://127.0.0.1, for any client of the OpenAI API

In Python: model.generate(..., cache=ScissorhandsCache(model, budget=256)), from partwise.serve.

All flags, with their defaults: partwise serve COMMAND --help; those of a method: partwise serve generate --method METHOD --help
"""
GENERATE = """\
Goes on with a text, with a key-value cache that never exceeds its budget. The text goes to standard output as it is written; a line on the terminal tells
speed and memory meanwhile. Settings of the chosen --method are flags, too.\
"""
COMPARE = """\
Predicts a text token by token with every method at every budget, beside the full cache in the same loop: perplexity, divergence from the full cache's
predictions (KL), bytes, tokens per second. Leaves a run folder with a report.\
"""
HTTP = """\
Serves a model to clients of the OpenAI API, on this machine only unless there is a token. The cache of every conversation keeps to --budget, and all of them
together to --memory-limit-mib. Ctrl-C ends it. Settings of the chosen --method are flags, too.\
"""
COMMANDS = ("generate", "compare", "http")


def pages() -> list[list[str]]:
    """The commands that have a help page, as words after ``partwise serve``."""
    return [[], *([name] for name in COMMANDS)]


def read(arguments: list[str]) -> Command | str:
    """The command that ``partwise serve ARGUMENTS`` asks for, or a help text."""
    if not arguments or arguments[0] in {"-h", "--help"}:
        return help_text()
    if arguments[0].startswith("-"):
        raise InputError(
            "bad-flag", f"got {arguments[0]} without a command, expected one of: {', '.join(COMMANDS)}. Try: partwise serve generate --help"
        )
    check_choice(arguments[0], COMMANDS, name="command")
    readers = {"generate": read_generate, "compare": read_compare, "http": read_http}
    return readers[arguments[0]](arguments[1:])


def read_generate(arguments: list[str]) -> Command:
    """``partwise serve generate``."""
    from partwise.serve._flags import read_generate_flags
    from partwise.serve._terminal import generation_lines

    flags = read_generate_flags(arguments, about=GENERATE)
    work = functools.partial(generate, flags)
    return Command(work=lambda report: work(report, lambda text: None), show=generation_lines, json=flags.output.json, stream=work)


def generate(flags: Any, report: Report, write: Write) -> dict[str, Any]:
    """Open the model, write, and say what it took."""
    import dataclasses

    from partwise.opened_models import open_model
    from partwise.serve._flags import numbers_of
    from partwise.serve.generate import generate_text, read_prompt

    prompt, budgets = read_prompt(flags.prompt.prompt, flags.prompt.prompt_file), numbers_of(flags.cache.budget, flag="--budget")
    report("loading the model", 0, 1, "")
    opened = open_model(flags.source.model, device=flags.source.device, dtype=flags.source.dtype)
    written = generate_text(
        opened.model,
        opened.tokenizer,
        prompt,
        flags.rule,
        budget=budgets[0] if len(budgets) == 1 else budgets,
        bits=flags.cache.bits,
        pinned=flags.cache.pinned,
        pin_prompt=flags.cache.pin_prompt,
        chat=flags.prompt.chat,
        prefill_chunk_size=flags.cache.prefill_chunk_size,
        sampling=flags.sampling,
        write=write,
        report=report,
    )
    asked = {"model": opened.name, "method": flags.cache.method, "call": repr(flags.rule), "budget": budgets, "bits": flags.cache.bits}
    return asked | {"tokens_per_second": written.tokens_per_second} | dataclasses.asdict(written)


def read_compare(arguments: list[str]) -> Command:
    """``partwise serve compare``."""
    from partwise.serve._flags import read_compare_flags
    from partwise.serve._recorder import record_comparison
    from partwise.serve._terminal import comparison_parts

    flags = read_compare_flags(arguments, about=COMPARE)
    words = ["partwise", "serve", "compare", *arguments]
    return Command(
        work=lambda report: record_comparison(flags.source, flags.settings, out=flags.output.out, command=words, report=report),
        show=comparison_parts,
        json=flags.output.json,
    )


def read_http(arguments: list[str]) -> Command:
    """``partwise serve http``."""
    from partwise.serve._flags import read_http_flags
    from partwise.serve._terminal import served_lines

    flags = read_http_flags(arguments, about=HTTP)

    def serve(report: Report, write: Write | None = None) -> dict[str, Any]:
        from partwise.serve.http_server import serve_http

        return serve_http(flags.server, rule=flags.rule, report=report, write=write)

    return Command(work=serve, show=served_lines, json=flags.output.json, stream=serve)


def help_text() -> str:
    """Help of ``partwise serve``: the commands, the methods as the index of the room has them, and examples. Loads no method."""
    from partwise import serve
    from partwise.serve._flags import DEFAULT_METHOD

    width = max(map(len, serve.RULES)) + 2
    index = dict(line.strip("- ").replace("`", "").split(" - ", 1) for line in (serve.__doc__ or "").splitlines() if line.startswith("- ``"))
    methods = "\n".join(f"  {name:<{width}}{index[name].rpartition(' - ')[0] or index[name]}" for name in serve.RULES)
    return HELP.format(default=DEFAULT_METHOD, methods=methods)
