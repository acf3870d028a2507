"""Flags of ``partwise serve``: made from dataclasses, and from that of the method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, make_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from partwise.checks import InputError, check_at_least, check_choice
from partwise.flags import flag_value, load_target, read_config, read_flags
from partwise.serve import RULES
from partwise.serve.generate import Sampling

if TYPE_CHECKING:
    from partwise.serve.rule import EvictionRule

DEFAULT_METHOD = "scissorhands"


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """Which model, and where it runs.

    Parameters
    ----------
    model : str or None
        A causal language model: a folder as save_pretrained writes it, or a Hugging Face id. Left out: the newest finished run of `partwise train` under
        runs/, and of its models the whole one.
    device : str or None
        cpu, cuda, cuda:1. Left out: the GPU if there is one.
    dtype : str or None
        Left out: float32 on a CPU, the model's own on a GPU.
    """

    model: str | None = None
    device: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None


@dataclass(frozen=True, kw_only=True)
class PromptFlags:
    """What to go on with.

    Parameters
    ----------
    prompt : str or None
        A text.
    prompt_file : Path or None
        A file with the text instead; - is standard input.
    chat : bool
        Put the text into the model's chat template, as what a user says.
    """

    prompt: str | None = None
    prompt_file: Path | None = None
    chat: bool = False


@dataclass(frozen=True, kw_only=True)
class CacheFlags:
    """What the cache may hold.

    Parameters
    ----------
    method : str
        Which tokens leave when the budget is spent; see `partwise list serve`. Its own settings are flags, too.
    budget : tuple of str
        Tokens that every layer and head keeps; or one number for each layer, 64,64,128.
    bits : int or None
        Store keys and values in so many bits. Left out: in the dtype of the model.
    pinned : int
        So many first tokens never leave.
    pin_prompt : bool
        No token of the prompt leaves.
    prefill_chunk_size : int or None
        Read the prompt in pieces of so many tokens: for one that does not fit even once. Later pieces then see what the cache has kept of earlier ones.
    """

    method: str = DEFAULT_METHOD
    budget: tuple[str, ...] = ("256",)
    bits: Literal[4, 8] | None = None
    pinned: int = 0
    pin_prompt: bool = False
    prefill_chunk_size: int | None = None

    def __post_init__(self) -> None:
        check_at_least(self.pinned, 0, name="pinned")
        if self.prefill_chunk_size is not None:
            check_at_least(self.prefill_chunk_size, 1, name="prefill_chunk_size")


@dataclass(frozen=True, kw_only=True)
class OutputFlags:
    """What is printed.

    Parameters
    ----------
    config : Path or None
        YAML file with flags as keys. Flags on the command line win.
    json : bool
        Print one JSON object on standard output and nothing else.
    """

    config: Path | None = None
    json: bool = False


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """What to measure, and on what text.

    Parameters
    ----------
    text : str or None
        A text file, or a folder of *.py, *.txt, *.md, *.rst. Left out: the source of Python's standard library; of a model that `partwise train` made from
        it, the files held out.
    tokens : int
        Tokens of a row of text. The first ones, as many as the smallest budget, are read at once; all others are predicted one by one.
    rows : int
        Rows of text, each from another file if there are enough. They run as one batch.
    budgets : tuple of str
        Tokens that every layer and head keeps: 64,128,256.
    methods : tuple of str
        all, or some of them: scissorhands,h2o.
    bits : int or None
        Store keys and values in so many bits. Left out: in the dtype of the model.
    recent : int, float or None
        The last tokens never leave: their number, or their share of the budget. Left out: as each method has it.
    num_sinks : int or None
        So many first tokens never leave. Left out: as each method has it.
    drop : int, float or None
        Tokens that leave when the budget is exceeded: their number, or their share of the budget. Left out: as each method has it.
    seed : int
        Of the choice of files.
    """

    text: str | None = None
    tokens: int = 512
    rows: int = 4
    budgets: tuple[str, ...] = ("64", "128", "256")
    methods: tuple[str, ...] = ("all",)
    bits: Literal[4, 8] | None = None
    recent: int | float | None = None
    num_sinks: int | None = None
    drop: int | float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_at_least(self.tokens, 3, name="tokens")
        check_at_least(self.rows, 1, name="rows")

    def budget_numbers(self) -> list[int]:
        """Budgets, each once, the smallest first."""
        return sorted(set(numbers_of(self.budgets, flag="--budgets")))

    def rules(self) -> dict[str, EvictionRule]:
        """Methods by name, with what the flags say instead of their own settings."""
        names = names_of(self.methods)
        if not names:
            raise InputError("bad-flag", f"--methods is empty, expected all, or some of: {', '.join(rule_names())}. Leave it out for all.")
        for name in names:
            check_choice(name, ["all", *rule_names()], name="method")
        chosen = rule_names() if "all" in names else list(dict.fromkeys(names))
        said = {name: getattr(self, name) for name in ("recent", "num_sinks", "drop") if getattr(self, name) is not None}
        return {name: replace(rule_class(name)(), **said) for name in chosen}


@dataclass(frozen=True, kw_only=True)
class CompareOutput(OutputFlags):
    """Where the run goes and what is printed.

    Parameters
    ----------
    out : Path or None
        Folder of the run. Left out: the first free runs/compare-001, -002, ...
    """

    out: Path | None = None


@dataclass(frozen=True, kw_only=True)
class CompareFlags:
    """Flags of ``partwise serve compare``."""

    source: ModelFlags = field(default_factory=ModelFlags)
    settings: CompareSettings = field(default_factory=CompareSettings)
    output: CompareOutput = field(default_factory=CompareOutput)


def rule_names() -> list[str]:
    """Methods of the room that say which tokens leave a cache."""
    return list(RULES)


def rule_class(name: str) -> type[EvictionRule]:
    """A method by name; an unknown one lists those that exist."""
    check_choice(name, rule_names(), name="method")
    found: type[EvictionRule] = load_target(RULES[name])
    return found


def flags_with_rule(rule: type[EvictionRule], before: Mapping[str, type[Any]], after: Mapping[str, type[Any]]) -> type[Any]:
    """The dataclass whose fields, with those of its parts, are the flags of a command that takes a method with its settings."""
    taken = {item.name for part in (*before.values(), *after.values()) for item in fields(part)}
    parts = {**before, "rule": hiding(rule, [item.name for item in fields(rule) if item.name in taken]), **after}
    return make_dataclass("Flags", [(name, part, field(default_factory=part)) for name, part in parts.items()], frozen=True, kw_only=True)


def hiding(rule: type[Any], names: Sequence[str]) -> type[Any]:
    """The dataclass without flags for these fields: another flag of the same name, such as ``--seed``, says them."""
    import tyro

    hidden = [(name, Annotated[Any, tyro.conf.Fixed, tyro.conf.Suppress], field(default=getattr(rule, name))) for name in names]
    return make_dataclass(rule.__name__, hidden, bases=(rule,), frozen=True, kw_only=True) if hidden else rule


def with_rule(flags: Any, rule: type[EvictionRule]) -> Any:
    """The flags with the rule itself, which takes what it was not asked for from flags of the same name."""
    others = [getattr(flags, item.name) for item in fields(flags) if item.name != "rule"]
    said = vars(flags.rule) | {name: value for part in others for name, value in vars(part).items()}
    return replace(flags, rule=rule(**{item.name: said[item.name] for item in fields(rule)}))


def read_with_rule(arguments: list[str], before: Mapping[str, type[Any]], after: Mapping[str, type[Any]], *, prog: str, about: str) -> Any:
    """Flags of a command with a method: from the command line, then ``--config``, then the defaults."""
    config = read_config(flag_value(arguments, "--config"))
    rule = rule_class(flag_value(arguments, "--method") or str(config.get("method", DEFAULT_METHOD)))
    return with_rule(read_flags(flags_with_rule(rule, before, after), arguments, prog=prog, about=about, stored={}, config=config), rule)


def read_generate_flags(arguments: list[str], *, about: str) -> Any:
    """Flags of ``partwise serve generate``, with ``source``, ``prompt``, ``cache``, ``rule``, ``sampling`` and ``output``."""
    before, after = {"source": ModelFlags, "prompt": PromptFlags, "cache": CacheFlags}, {"sampling": Sampling, "output": OutputFlags}
    flags = read_with_rule(arguments, before, after, prog="partwise serve generate", about=about)
    check_prompt(flags.prompt)
    return flags


def read_http_flags(arguments: list[str], *, about: str) -> Any:
    """Flags of ``partwise serve http``, with ``server``, ``rule`` and ``output``."""
    from partwise.serve.http_server import HttpFlags

    return read_with_rule(arguments, {"server": HttpFlags}, {"output": OutputFlags}, prog="partwise serve http", about=about)


def read_compare_flags(arguments: list[str], *, about: str) -> CompareFlags:
    """Flags of ``partwise serve compare``: from the command line, then ``--config``, then the defaults."""
    config = read_config(flag_value(arguments, "--config"))
    flags: CompareFlags = read_flags(CompareFlags, arguments, prog="partwise serve compare", about=about, stored={}, config=config)
    return flags


def check_prompt(prompt: PromptFlags) -> None:
    """Refuse no prompt, and two."""
    if prompt.prompt is None and prompt.prompt_file is None:
        raise InputError(
            "no-prompt", "got no prompt, expected a text to go on with. Pass --prompt TEXT, or --prompt-file FILE (- is standard input)."
        )
    if prompt.prompt is not None and prompt.prompt_file is not None:
        raise InputError("prompt-and-file", f"got --prompt and --prompt-file {prompt.prompt_file}, expected one of them. Leave one out.")


def numbers_of(words: Sequence[str], *, flag: str) -> list[int]:
    """Whole numbers above 0, separated by commas or spaces."""
    found = names_of(words)
    if not found or not all(word.isdecimal() and int(word) > 0 for word in found):
        raise InputError("bad-flag", f"{flag} is {' '.join(words) or 'empty'}, expected whole numbers above 0. Write them as {flag} 64,128,256.")
    return [int(word) for word in found]


def names_of(words: Sequence[str]) -> list[str]:
    """Words separated by commas or spaces."""
    return [word.strip() for part in words for word in part.split(",") if word.strip()]
