"""`openling data`: build a tokenised corpus, look at it, verify it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from openling.errors import UserError

EXAMPLES = """examples:
  openling data build corpus/web.jsonl code=~/src/linux corpus/OUT --tokenizer MODEL --licence web=ODC-BY --licence code=GPL-2.0
  openling data build python-docs kjv corpus/OUT --tokenizer MODEL --filter self-repetition --filter structure --dedup near
  openling data inspect corpus/OUT
  openling data mix stage.toml --rows 512 --steps 10000
  openling data verify corpus/OUT
  openling data sample TEACHER samples/OUT --tokens 10000000 --prompt both
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `openling data`."""
    parser.epilog = EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    what = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    build = what.add_parser("build", help="sources to tokenised shards; the same command continues or mends", allow_abbrev=False)
    build.add_argument(
        "sources", nargs="+", metavar="[NAME=]SOURCE", help="JSONL, Parquet, text, code, a folder of them, a built-in text"
    )
    build.add_argument("out", type=Path, metavar="OUT", help="new folder; OUT.run beside it keeps plan and journal")
    build.add_argument("--tokenizer", type=Path, required=True, metavar="MODEL", help="folder with a tokenizer, or bytes")
    build.add_argument(
        "--licence", action="append", default=[], metavar="[NAME=]L", help="of a source, or of all without their own"
    )
    build.add_argument("--language", action="append", default=[], metavar="[NAME=]L", help="the same")
    build.add_argument("--text-field", default="text", metavar="NAME", help="column of the text (default: text)")
    build.add_argument("--source-field", default="source", metavar="NAME", help="column of a document's source")
    build.add_argument("--licence-field", default="license", metavar="NAME", help="column of its licence")
    build.add_argument("--language-field", default="language", metavar="NAME", help="column of its language")
    own = "or package.module.function"
    build.add_argument("--filter", action="append", default=[], metavar="STEP", help=f"self-repetition, structure {own}")
    build.add_argument("--dedup", default="none", metavar="HOW", help="none (default), exact, near or near:0.8 (similarity)")
    recipes = f"atomic-facts, long-documents, recall {own}"
    build.add_argument("--synthesis", action="append", default=[], metavar="STEP", help=recipes)
    build.add_argument("--control-tokens", action="store_true", help="those that texts spell out are meant: rendered chats")
    build.add_argument("--skip-bad", action="store_true", help="leave unreadable lines and files out, and count them")
    build.add_argument("--seed", type=int, default=0, help="of the order of documents within a shard")
    build.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core where it pays)")
    inspect = what.add_parser("inspect", help="what a corpus holds: sources, licences, languages, what was removed")
    inspect.add_argument("folder", type=Path, metavar="FOLDER")
    inspect.add_argument("--json", action="store_true", help="as JSON")
    mix = what.add_parser("mix", help="what a mixture asks of its sources; exit code 2 where they cannot give it")
    mix.add_argument("mixture", type=Path, metavar="TOML", help="sources, shares or preset, length: docs/data.md")
    mix.add_argument("--rows", type=int, required=True, metavar="N", help="rows of the global batch")
    mix.add_argument("--steps", type=int, required=True, metavar="N", help="batches of the run")
    mix.add_argument("--seed", type=int, default=0)
    verify = what.add_parser("verify", help="read every byte and compare hashes; exit code 1 where something is wrong")
    verify.add_argument("folder", type=Path, metavar="FOLDER")
    _add_sample(what.add_parser("sample", help="text that a model writes itself, as JSONL", allow_abbrev=False))


def _add_sample(sample: argparse.ArgumentParser) -> None:
    from openling.commands.complete import add_dtype

    sample.add_argument("model", type=Path, metavar="MODEL", help="checkpoint folder that writes")
    sample.add_argument("out", type=Path, metavar="OUT", help="new folder of .jsonl files; OUT.run keeps plan and journal")
    sample.add_argument("--tokens", type=int, required=True, metavar="N", help="tokens of the documents that are kept")
    sample.add_argument("--batch", type=int, metavar="B", help="sequences at once (default: 512 on a GPU, 32 on a CPU)")
    sample.add_argument("--max-new-tokens", type=int, default=1024, metavar="L", help="of a document (default: 1024)")
    sample.add_argument("--temperature", type=float, default=1.0, help="1 (default) is the model's own distribution")
    starts = "bos (default): documents from their start; chat: a question and its answer; both"
    sample.add_argument("--prompt", choices=["bos", "chat", "both"], default="bos", help=starts)
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    add_dtype(sample)


def run(args: argparse.Namespace) -> int:
    """Do it; the exit code."""
    return {"build": _build, "inspect": _inspect, "mix": _mix, "verify": _verify, "sample": _sample}[args.what](args)


def _named(words: list[str], names: list[str]) -> dict[str, str]:
    """NAME=VALUE for one source, VALUE for all."""
    found: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if equals and name not in names:
            raise UserError("there is no source of that name", value=name, expected=", ".join(names))
        found.update({name: value} if equals else {n: word for n in names if n not in found})
    return found


def _build(args: argparse.Namespace) -> int:
    from openling.commands.migrate import open_console
    from openling.data.build import BuildConfig, build
    from openling.data.byte_tokenizer import byte_tokenizer
    from openling.data.sources import Fields, parse_source
    from openling.weights.folder import load_tokenizer

    if args.workers is not None and args.workers < 1:
        raise UserError("a build needs a process", where="--workers", value=args.workers, expected="1 or more")
    names = [parse_source(w, licences={}, languages={}).name for w in args.sources]
    licences, languages = _named(args.licence, names), _named(args.language, names)
    sources = tuple(parse_source(w, licences=licences, languages=languages) for w in args.sources)
    own = str(args.tokenizer) == "bytes" and not args.tokenizer.exists()
    tokenizer = byte_tokenizer() if own else load_tokenizer(args.tokenizer)
    if tokenizer is None:
        raise UserError("the folder has no tokenizer", where=args.tokenizer, expected="tokenizer.json")
    fields = Fields(args.text_field, args.source_field, args.licence_field, args.language_field)
    steps = {"filters": tuple(args.filter), "dedup": args.dedup, "synthesis": tuple(args.synthesis)}
    steps["control_tokens"] = args.control_tokens
    config = BuildConfig(sources, fields, skip_bad=args.skip_bad, seed=args.seed, **steps)
    console = open_console(stderr=True)
    build(config, args.out, tokenizer, workers=args.workers, say=lambda t: console.print(t, highlight=False))
    print(describe(args.out))
    return 0


def describe(folder: Path) -> str:
    """A corpus in words."""
    from openling.data.dataset import Dataset

    data = Dataset(folder)
    width = max(len(name) for name in data.sources)
    lines = [f"{folder}: {data.tokens:,} tokens in {len(data.index['shards'])} shards"]
    for name, s in data.sources.items():
        about = f"{s['tokens']:>16,} tokens  {s['documents']:>12,} documents  {s['licence']}  {s['language']}"
        lines.append(f"  {name:<{width}} {about}")
    report = data.index["report"]
    for step, counts in report["steps"].items():
        lines.append(f"  {step}: " + ", ".join(f"{value:,} {key}" for key, value in counts.items()))
    if empty := report.get("empty", 0):  # corpora of before it was counted have none
        lines.append(f"  left out: {empty:,} documents without text")
    for name in report.get("absent", []):
        lines.append(f'  no row has a word under "{name}", which was named as a column')
    if report["bad"]:
        lines += [f"  left out: {report['bad']:,} unreadable lines or files, among them", *(f"    {n}" for n in report["named"])]
    return "\n".join(lines)


def _inspect(args: argparse.Namespace) -> int:
    from openling.data.shards import read_index

    print(json.dumps(read_index(args.folder), indent=1) if args.json else describe(args.folder))
    return 0


def _mix(args: argparse.Namespace) -> int:
    import tomllib

    from openling.config.data import read_mixture
    from openling.data.mixture import MixtureBatches

    if min(args.rows, args.steps) < 1:
        raise UserError("a run has rows and steps", value=f"{args.rows} rows, {args.steps} steps", expected="1 or more of each")
    try:
        fields = tomllib.loads(args.mixture.read_text())
    except (OSError, ValueError) as error:
        raise UserError("the mixture cannot be read", where=args.mixture, value=error, expected="a TOML file") from error
    if "stages" in fields:
        raise UserError(
            "this is a recipe, which has a mixture in every stage", where=args.mixture, expected="sources, shares or preset",
            next=f"openling train {args.mixture} checks all of them before its first step",
        )  # fmt: skip
    batches = MixtureBatches(read_mixture(fields, where=args.mixture), rows=args.rows, seed=args.seed)
    needs = batches.needs(args.steps)
    total, width = sum(n.tokens for n in needs), max(len(n.source) for n in needs)
    print(f"{args.steps:,} steps of {batches.tokens_per_step:,} tokens: {total:,} tokens")
    for n in needs:
        asked = f"{n.tokens / total:8.3%}  {n.tokens:>18,} of {n.available:,} tokens: {n.epochs:.3f} epochs, at most {n.repeat:g}"
        print(f"  {n.source:<{width}}  {n.group:<12} {asked}")
    batches.check(args.steps)
    return 0


def _verify(args: argparse.Namespace) -> int:
    from openling.data.dataset import Dataset

    dataset = Dataset(args.folder, check=False)
    wrong = 0
    for shard, problems in dataset.verify():
        for problem in problems:
            print(f"wrong  {shard}: {problem}")
        wrong += bool(problems)
    print(f"{len(dataset.index['shards'])} shards, {dataset.tokens:,} tokens: {wrong or 'nothing'} wrong")
    return int(wrong > 0)


def _sample(args: argparse.Namespace) -> int:
    from openling.commands.migrate import open_console
    from openling.data.sample import Job, SampleConfig, sample
    from openling.model.device import pick_device
    from openling.model.ling import Ling
    from openling.ops.pick import kernels_reason
    from openling.weights.dtype import load_computed
    from openling.weights.folder import load_tokenizer, open_folder

    config = SampleConfig(args.tokens, args.max_new_tokens, args.temperature, args.prompt, args.seed)
    device, opened = pick_device(args.device), open_folder(args.model)
    console = open_console(stderr=True)

    def say(text: str) -> None:
        console.print(text, highlight=False)

    def load() -> Ling:
        loaded, computed = load_computed(args.model, dtype=args.dtype, device=device)
        say(f"Ops: {kernels_reason(device)}. Weights: {computed}.")
        return loaded.model

    tokenizer = load_tokenizer(args.model, opened.config)
    total = sample(Job(args.model, args.out, config, opened.config, tokenizer, args.batch, say), load)
    print(f"{args.out}: {total['tokens']:,} tokens in {total['documents']:,} of {total['drawn']:,} documents")
    for why, count in total["dropped"].items():
        print(f"  {count:,} dropped: {why}")
    return 0
