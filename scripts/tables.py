"""Writes the generated tables into README.md and docs/, and the picture of a step; or checks that they are up to date.

    python scripts/tables.py            rewrite what stands between the markers
    python scripts/tables.py --check    exit with status 1 if that would change something

A table stands between ``<!-- generated: NAME -->`` and ``<!-- end -->``, on any page.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.summary import as_tables
from docs_site import flags_as_code
from emojinet.frontier import by_cost, cells
from emojinet.report import ARMS as NAMES
from emojinet.report import METRICS as COLUMNS
from gpu.report import markdown
from step_picture import svg
from versions.features import FEATURES

from arf_plugin.ablation.table import as_markdown
from arf_plugin.checks.rules import RULES
from arf_plugin.evaluation.suites import load_suite
from arf_plugin.flags import add_arf_flags
from arf_plugin.hooks.engine import covers
from arf_plugin.hooks.releases import PACKAGE, RELEASES, SUPPORTED, Release
from arf_plugin.hooks.table import HOOKS

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
PICTURE = ROOT / "docs" / "figures" / "step.svg"
RESULTS = "emojinet"  # runs/quickstart/results.json of a clean clone
GRID = "emojinet-grid"  # runs/ablation/main/results.json
ARMS = {arm: name.replace("WiSE-FT", "WiSE-FT 0.5") for arm, name in NAMES.items()}


def versions() -> str:
    """Declared and tested releases."""
    rows = []
    for versions in SUPPORTED:
        tested = [release for release in RELEASES if covers(versions, release.version)]
        columns = [[r for r in tested if r.every_change], [r for r in tested if not r.every_change]]
        rows.append(
            [f"`{PACKAGE}{versions}`", *(", ".join(map(_named, column)) or "–" for column in columns)]
        )
    return _table(["declared", "tested on every change", "tested with `nox`"], rows)


def _named(release: Release) -> str:
    commit = f" (unreleased, commit {release.commit[:8]})" if release.commit else ""
    return f"`{release.version}`{commit}"


def flags() -> str:
    """Every flag that the trainer's parser gets, group by group, with its help."""
    parser = argparse.ArgumentParser()
    add_arf_flags(parser)
    tables = []
    for group in parser._action_groups:
        rows = [
            [f"`{action.option_strings[0]}{_value(action)}`", _prose(action.help or "")]
            for action in group._group_actions
            if action.dest.startswith("arf_")
        ]
        if rows:
            title = (
                (group.title or "")
                .removeprefix("Anchor-based Robust Fine-tuning")
                .replace(" (arf-plugin)", "")
            )
            tables.append(
                f"**{title.strip(' ,') or 'anchors and texts'}**\n\n{_table(['flag', 'meaning'], rows)}"
            )
    return "\n\n".join(tables)


def _value(action: argparse.Action) -> str:
    if action.choices:
        return f" {{{','.join(map(str, action.choices))}}}"
    return "" if action.nargs == 0 else f" {action.metavar}{' ...' if action.nargs else ''}"


def hooks() -> str:
    """Every upstream name that the plugin touches."""
    rows = [
        [f"`{hook.id}`", f"`{hook.target}`", f"`{hook.versions}`", hook.when, _prose(hook.why)]
        for hook in HOOKS
    ]
    return _table(["hook", "upstream name", "releases", "in force", "what for"], rows)


def checks() -> str:
    """What is checked before the first step."""
    rows = [[f"`{rule.id}`", rule.of, rule.checks, rule.happens, rule.where] for rule in RULES]
    return _table(["rule", "input", "what is checked", "otherwise", "when"], rows)


def mistakes() -> str:
    """What scripts/mistakes.py has done wrong, and what was said."""
    found = json.loads((ROOT / "docs" / "mistakes.json").read_text(encoding="utf-8"))
    rows = [
        [one["mistake"], _code(one["command"]), "<br>".join(map(_code, one["said"].splitlines()))]
        for one in found
    ]
    return _table(["mistake", "command", "what is said"], rows)


def _code(text: str) -> str:
    text = text.replace("|", "\\|")
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def results() -> str:
    """The quickstart's figures: mean and sample standard deviation over seeds, and every seed."""
    found = _figures(RESULTS)
    mean, deviation = found["arms"], found["std"]
    rows = [
        [
            name,
            *(
                f"{mean[arm][c]:.1f}" + (f" ± {deviation[arm][c]:.1f}" if arm != "before" else "")
                for c in COLUMNS
            ),
        ]
        for arm, name in ARMS.items()
    ]
    return _table(["top-1 %", *COLUMNS.values()], rows)


def seeds() -> str:
    """The same, FLYP and ARF seed by seed."""
    found = _figures(RESULTS)
    flyp, arf = found["per_seed"]["flyp"], found["per_seed"]["arf"]
    each = [
        [f"seed {seed}", *(f"{flyp[seed][column]:.1f} → {arf[seed][column]:.1f}" for column in COLUMNS)]
        for seed in map(str, found["seeds"])
    ]
    return _table(["FLYP → ARF", *COLUMNS.values()], each)


def grid() -> str:
    """The table of `arf ablate emojinet`: every arm as fine-tuned, and at the alpha that validation chose."""
    return _grid_table(lambda found: found["rows"])


def grid_wise() -> str:
    """The same arms with WiSE-FT at 0.5."""
    return _grid_table(
        lambda found: [
            found["wise"][row["arm"]]["0.5"]
            for row in found["rows"]
            if row["alpha"] is None and "0.5" in found["wise"].get(row["arm"], {})
        ]
    )


def _grid_table(rows: Callable[[dict[str, Any]], list[dict[str, Any]]]) -> str:
    """Some rows of the grid's figures, columns in the suite's order (the file is sorted by name)."""
    found = _figures(GRID)
    columns = load_suite(found["suite"]).averages
    chosen = [{**row, "mean": {name: row["mean"][name] for name in columns}} for row in rows(found)]
    return as_markdown({**found, "rows": chosen}).rstrip()


def iconnet_data() -> str:
    """What IconNet holds; written by scripts/iconnet/build.py."""
    found = _figures("iconnet")
    classes, task, pool = found["classes"], found["task"], found["pool"]
    tuned, held_out, validated = (len(classes[part]) for part in ("fine_tuned", "held_out", "validation"))

    def images(kind: str) -> str:
        counts = (
            sum(n for name, n in found["evaluation"].items() if name.startswith(f"{half}/{kind}"))
            for half in ("test", "validation")
        )
        return " / ".join(f"{count:,}" for count in counts)

    domains = sum(name.startswith("test/shift/") for name in found["evaluation"])
    fine = found["fine_classes"]
    both = found["evaluation"]
    zero_shot = " / ".join(f"{both[f'{half}/zero_shot']:,}" for half in ("test", "validation"))
    rows = [
        ["task", "`task/train`", f"{task['train']:,}", f"line drawings of {tuned} classes, `png` + `cls`"],
        ["pool for pretraining", "`pretraining`", f"{pool['icons']:,}", "three texts each"],
        [
            "pool for retrieval",
            "`pool/icons-*`, `pool/unrelated-*`",
            f"{pool['icons']:,} + {pool['unrelated']:,}",
            "one text each",
        ],
        ["ID, test / validation", "`evaluation/{test,validation}/id`", images("id"), f"{tuned} classes"],
        [
            "shift",
            "`.../shift/SET-STYLE`",
            images("shift/"),
            f"the same classes in {domains} sets and styles",
        ],
        ["zero-shot", "`.../zero_shot`", zero_shot, f"{held_out} / {validated} held-out classes"],
        [
            "zero-shot fine",
            "`.../zero_shot_fine`",
            images("zero_shot_fine"),
            f"concepts with their variants: {fine['test']} / {fine['validation']} classes",
        ],
    ]
    return _table(["part", "where", "images", "what it is"], rows)


def frontier() -> str:
    """Accuracy against the cost of a step, of the arms of `arf ablate emojinet-frontier`."""
    return _frontier("emojinet-frontier")


def frontier_vit() -> str:
    """The same of `arf ablate emojinet-frontier-vit`."""
    return _frontier("emojinet-frontier-vit")


def _frontier(grid: str) -> str:
    found = _figures(grid)
    rows = []
    for arm in by_cost(found):
        label = f"**{arm['label']}** (chosen)" if arm["arm"] == found["chosen"] else arm["label"]
        rows.append([label, *cells(arm)])
    picture = f"![Accuracy against the cost of a step](figures/{grid}.png)"
    return f"{_table(['%', 'cost', *found['metrics'], 'validation'], rows)}\n\n{picture}"


def step() -> str:
    """Time and FLOPs of a step in units of a plain one; written by scripts/bench/step.py."""
    found = _figures("bench/step")["data"]
    header = [f"{model}, B = {each['batch size']}" for model, each in found.items()]
    costs = [each["time and FLOPs, x plain"] for each in found.values()]
    rows = [
        [name, *(f"{each[name][0]:.2f} ({each[name][1]:.2f})" for each in costs)]
        for name in next(iter(costs))
    ]
    return _table(["step", *header], rows)


def memory() -> str:
    """Peak memory of a step; written by scripts/bench/memory.py."""
    found = _figures("bench/memory")
    peaks = {name: min(run["peak"] for run in runs) for name, runs in found["data"].items()}
    plain, state = peaks["plain"], found["data"]["plain"][0]["state"]
    rows = [
        [name, f"{peak:,.0f}", f"{peak / plain:.2f}", f"{(peak - state) / (plain - state):.2f}"]
        for name, peak in peaks.items()
    ]
    what = f"{found['facts']['model']}, {found['facts']['batch']}"
    return _table([what, "peak, MB", "of plain", "of plain, without weights and state"], rows)


def cost() -> str:
    """What every benchmark promises and measured; written by scripts/bench/all.sh."""
    rows = []
    for path in sorted((ROOT / "docs" / "figures" / "bench").glob("*.json")):
        found = _figures(f"bench/{path.stem}")
        alike: dict[tuple[str, str], list[float]] = {}
        noise: dict[tuple[str, str], float] = {}
        for bar in found["bars"]:
            promise = f"{'at most' if bar['at_most'] else 'at least'} {bar['bound']:.3g}"
            key = bar["claim"], promise
            alike.setdefault(key, []).append(bar["measured"])
            noise[key] = max(noise.get(key, 0.0), bar.get("error", 0.0))
        for key, measured in alike.items():
            seen = f"{min(measured):.3g}"
            if len(measured) > 1:
                seen += f" to {max(measured):.3g} ({len(measured)} cases)"
            seen += f", ± {noise[key]:.2g}" if noise[key] else ""
            rows.append([found["title"], key[0], seen, key[1], f"`{found['command']}`"])
    return _table(["what", "figure", "measured", "promised", "command"], rows)


def pool() -> str:
    """Exact search of large pools; written by scripts/bench/pool.py."""
    found = _figures("bench/pool")
    rows = [
        [
            f"{one['rows']:,}",
            f"{one['seconds']:.0f} s",
            f"{1e6 * one['seconds'] / one['rows']:.1f} s",
            f"{one['memory'] / 2**20:,.0f} MiB",
        ]
        for one in found["data"]
    ]
    rate = found["data"][-1]["seconds"] / found["data"][-1]["rows"]
    rows += [
        [f"{beyond:,} (projected)", f"{rate * beyond / 3600:.1f} h", f"{1e6 * rate:.1f} s", "as much"]
        for beyond in (100_000_000, 1_000_000_000)
    ]
    facts = found["facts"]
    what = f"rows ({facts['queries']} queries, {facts['dimension']} dimensions, --memory {facts['memory']})"
    return _table([what, "time", "per million rows", "memory it adds"], rows)


def growth() -> str:
    """How the time of each stage grows; written by scripts/bench/growth.py."""
    found = _figures("bench/growth")["data"]
    rows = [
        [stage, *(f"{seconds:.3g}" for seconds in of_size.values()), f"{found['exponents'][stage]:.2f}"]
        for stage, of_size in found["seconds"].items()
    ]
    return _table(["stage", *(f"{size:,} samples, s" for size in found["sizes"]), "exponent"], rows)


def duplicates() -> str:
    """Near-duplicates and exclusion among many; written by scripts/bench/duplicates.py."""
    rows = [
        [
            f"{one['rows']:,}",
            one["kind"],
            f"{one['seconds']:.0f} s",
            f"{one['memory'] / 1e9:.1f} GB",
            f"{one['recall']:.5f}",
        ]
        for one in _figures("bench/duplicates")["data"]
    ]
    return _table(["vectors", "by", "time", "memory", "of planted copies found"], rows)


def emojinet_rates() -> str:
    """What one pretrained model's candidates scored on validation sets; kept by scripts/benchmarks/grid.sh --keep."""
    arms = _figures("grids/emojinet/resnet-0/all/choices")["arms"]
    labels = _figures("emojinet-remember")["lines"]
    rows = []
    for arm, choice in arms.items():
        names = choice["by"].split(" + ")
        scores: dict[str, dict[str, str]] = collections.defaultdict(dict)
        for number, candidate in enumerate(choice["candidates"]):
            flags = dict(candidate["flags"])
            rate, weight = flags.pop("lr"), ", ".join(f"`--{name} {value}`" for name, value in flags.items())
            mean = f"{sum(candidate['validation'][name] for name in names) / len(names):.1f}"
            scores[weight][rate] = f"**{mean}**" if number == choice["chosen"] else mean
        rows += [[labels[arm]["label"], weight, *of_rate.values()] for weight, of_rate in scores.items()]
    rates = list(dict.fromkeys(c["flags"]["lr"] for c in choice["candidates"]))
    return _table(["arm", "weight", *(f"lr {rate}" for rate in rates)], rows)


def emojinet_remember() -> str:
    """Ways to remember on EmojiNet; written by scripts/benchmarks/summary.py."""
    return _remember("emojinet")


def iconnet_remember() -> str:
    """The same on IconNet."""
    return _remember("iconnet")


def _remember(benchmark: str) -> str:
    return "\n\n".join(_table(*table) for table in as_tables(_figures(f"{benchmark}-remember"), merges=False))


def gpu() -> str:
    """What scripts/gpu_check.py found on a machine with a GPU."""
    return markdown(_figures("gpu")).rstrip()


def _figures(name: str) -> dict[str, Any]:
    """Figures that a script wrote for the documentation."""
    found: dict[str, Any] = json.loads((ROOT / "docs" / "figures" / f"{name}.json").read_text())
    return found


def features() -> str:
    """Releases and features, one table for each group; written by scripts/versions/matrix.py."""
    cells = json.loads((ROOT / "docs" / "versions.json").read_text())["cells"]
    tables = []
    for group in dict.fromkeys(feature.group for feature in FEATURES):
        columns = [feature for feature in FEATURES if feature.group == group]
        rows = [
            [f"`{release.version}`", *(_cell(cells[release.version][feature.id]) for feature in columns)]
            for release in RELEASES
        ]
        tables.append(
            f"**{group}**\n\n{_table(['open_clip', *(feature.title for feature in columns)], rows)}"
        )
    return "\n\n".join(tables)


def _cell(cell: dict[str, str]) -> str:
    if cell["status"] == "passed":
        return "passed"
    if cell["status"] not in ("refused", "upstream broken") or not cell["detail"]:
        raise ValueError(f"docs/versions.json holds a failure that is not explained: {cell}")
    return f"{cell['status']}: {_as_cell(cell['detail'])}"


def upstream_tests() -> str:
    """open_clip's own tests with the plugin and without; written by scripts/versions/upstream_tests.py."""
    found = json.loads((ROOT / "docs" / "upstream-tests.json").read_text(encoding="utf-8"))
    header = [
        "open_clip",
        "tests of",
        "tests",
        "passed",
        "failed: no model hub",
        "failed otherwise",
        "skipped",
    ]
    rows, others = [], []
    for version in (release.version for release in RELEASES):
        run = found.get(version)
        if run is None:
            rows.append([f"`{version}`", "not run yet", *[""] * len(header)])
            continue
        kinds = collections.Counter(_outcome(*told) for told in run["not passed"].values())
        left_out = run["left out"] + kinds["left out"]
        counts = [run["tests"] + run["left out"], run["without"]["passed"]]
        counts += [kinds[kind] for kind in ("no hub", "failed", "skipped")]
        different = ", ".join(f"`{name}`" for name in run["different"]) or "none"
        rows.append([f"`{version}`", run["source"], *map(str, counts), str(left_out), different])
        for name, told in run["not passed"].items():
            if _outcome(*told) == "failed":
                others.append(f"* `{version}` `{name}`: {_as_cell(told[1])}")
    table = _table([*header, "left out", "other outcome or message with the plugin"], rows)
    return "\n\n".join([table, *(["Failed otherwise, in both runs:", "\n".join(others)] if others else [])])


def _outcome(outcome: str, message: str) -> str:
    """What kind of outcome a test that did not pass had."""
    if outcome == "skipped":
        return "left out" if message.startswith("left out") else "skipped"
    hub = "huggingface|HF_HUB_OFFLINE|offline mode|on the Hub|HF Hub|Failed to download weights"
    return "no hub" if re.search(hub, message) else "failed"


def _as_cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _prose(text: str) -> str:
    """A cell in which flags are set as code."""
    return flags_as_code(_as_cell(text))


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def rewritten(text: str) -> str:
    """A page's text with fresh tables."""
    tables = (
        versions,
        flags,
        hooks,
        features,
        checks,
        mistakes,
        upstream_tests,
        results,
        seeds,
        grid,
        grid_wise,
        iconnet_data,
        frontier,
        frontier_vit,
        step,
        memory,
        cost,
        pool,
        growth,
        duplicates,
        emojinet_rates,
        emojinet_remember,
        iconnet_remember,
        gpu,
    )
    makers = {maker.__name__: maker for maker in tables}
    return re.sub(
        r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)",
        lambda match: f"{match[1]}{makers[match[2]]()}\n{match[3]}",
        text,
        flags=re.DOTALL,
    )


def main() -> int:
    wanted = {page: rewritten(page.read_text(encoding="utf-8")) for page in PAGES} | {PICTURE: svg()}
    stale = [
        path for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    if "--check" not in sys.argv:
        for path in stale:
            path.write_text(wanted[path], encoding="utf-8")
        return 0
    for path in stale:
        print(f"{path.name} is out of date; run: python scripts/tables.py", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
