"""What a run found, as tables."""

from __future__ import annotations

from typing import Any

from gpu import cost


def markdown(content: dict[str, Any]) -> str:
    """Tables of verdicts and of costs."""
    machine, checks = content["machine"], content["checks"]
    packages = machine.get("packages", {})
    lines = [
        f"{machine.get('device', content['device'])}, driver {machine.get('driver')}, torch {packages.get('torch')} "
        f"(CUDA {machine.get('cuda')}), open_clip {packages.get('open_clip_torch')}, Python {machine.get('python')}, "
        f"{machine.get('cores')} cores; commit {content['commit']}; {content['date']}; {content['seconds']:.0f} s"
        f"{'; tiny sizes, times mean nothing' if content['tiny'] else ''}.",
        "",
        *_table(
            ["check", "verdict", "promises kept", "s", "found"],
            [
                [
                    name,
                    row["status"],
                    f"{sum(bar['met'] for bar in row.get('bars', []))} of {len(row.get('bars', []))}",
                    f"{row.get('seconds', 0):.0f}",
                    (row.get("summary") or row.get("error", "").strip().split("\n")[0]).replace("|", "/")
                    + (f" (commit {row['commit']})" if "commit" in row else ""),
                ]
                for name, row in checks.items()
            ],
        ),
    ]
    missed = [
        f"- {name}: {bar['claim']}: {bar['measured']:.4g}, promised {bar['bound']:.4g}"
        for name, row in checks.items()
        for bar in row.get("bars", [])
        if not bar["met"]
    ]
    lines += ["", "Missed:", "", *missed] if missed else []
    for name in cost.steps():
        figures = checks.get(name, {}).get("figures")
        if figures:
            lines += [
                "",
                f"{figures['model']}, B = {figures['B']}, {figures['precision']}:",
                "",
                *_costs(figures),
            ]
    notes = {note: None for row in checks.values() for note in row.get("notes", [])}
    lines += ["", *notes] if notes else []
    loaded = checks.get("loaders", {}).get("figures")
    if loaded:
        rates = loaded["images/s of loaders, by workers"]
        lines += [
            "",
            *_table(
                ["images/s of loaders, by workers", *rates["ARF"]],
                [[n, *(f"{r:.0f}" for r in row.values())] for n, row in rates.items()],
            ),
        ]
        steps = [
            [n, f"{rate:.0f}", loaded["enough workers"][n]] for n, rate in loaded["images/s of steps"].items()
        ]
        lines += ["", *_table(["step", "images/s", "workers that keep up"], steps)]
    return "\n".join(lines) + "\n"


def _costs(figures: dict[str, Any]) -> list[str]:
    heads = ["step", "ms", "time x plain", "FLOPs x plain", "TFLOP/s", "images/s", "peak memory", "x plain"]
    rows = []
    plain = figures["rows"]["plain"]["peak memory"]
    for name, row in figures["rows"].items():
        peak = row["peak memory"]
        memory = [f"{peak / 2**30:.2f} GiB", f"{peak / plain:.2f}"] if peak else ["–", "–"]
        ratios = [f"{row['x plain']:.3f}", f"{row['FLOPs x plain']:.3f}", f"{row['TFLOP/s']:.3g}"]
        rows.append([name, f"{row['median'] * 1e3:.1f}", *ratios, f"{row['images/s']:.0f}", *memory])
    return _table(heads, rows)


def _table(heads: list[str], rows: list[list[Any]]) -> list[str]:
    return [
        f"| {' | '.join(map(str, heads))} |",
        f"|{' --- |' * len(heads)}",
        *(f"| {' | '.join(map(str, row))} |" for row in rows),
    ]
