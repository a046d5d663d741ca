"""The results of compare.py as a Markdown table and as an SVG chart."""

from html import escape
from statistics import median
from typing import Any

__all__ = ["GOALS", "markdown", "svg"]

OURS = "asyncengine"
GOALS = {
    "bf16": {"1": 1.15, "8": 2.0, "32": 1.8, "prefill": 1.2},
    "int8": {"1": 1.7, "8": 3.0, "32": 2.5, "prefill": 1.5},
    "int4": {"1": 1.5, "8": 3.0, "32": 3.0, "prefill": 1.5},
}
"""What two cores are to reach with the demo model, as ratios to the best peer of the same precision."""

COLOURS = {
    OURS: "#c0392b",
    "llama.cpp": "#2c3e50",
    "openvino": "#2980b9",
    "ctranslate2": "#27ae60",
    "vllm": "#f39c12",
    "transformers": "#7f8c8d",
}


class Table:
    """What the numbers of a run say; a column is a number of requests, or the prefill."""

    def __init__(self, results: dict[str, Any]) -> None:
        self.results = results
        self.columns = [str(n) for n in results["batches"]] + ["prefill"] * bool(results["prefill"])

    def variants(self, precision: str) -> dict[str, dict[str, Any]]:
        every: dict[str, dict[str, Any]] = self.results["results"]
        return {name: r for name, r in every.items() if r["precision"] == precision and r["rounds"]}

    def values(self, result: dict[str, Any], column: str) -> list[float]:
        """Of every round: output tokens per second; of the prefill, milliseconds."""
        seconds = [one["seconds"][column] for one in result["rounds"]]
        if column == "prefill":
            return [1000 * s for s in seconds]
        return [int(column) * self.results["length"] / s for s in seconds]

    def best_peer(self, precision: str, column: str) -> str | None:
        peers = {
            name: median(r["seconds"][column] for r in result["rounds"])
            for name, result in self.variants(precision).items()
            if result["engine"] != OURS
        }
        return min(peers, key=lambda name: peers[name]) if peers else None

    def ratios(self, ours: dict[str, Any], peer: dict[str, Any], column: str) -> list[float]:
        """How many times as fast as the peer, round by round."""
        pairs = zip(ours["rounds"], peer["rounds"], strict=False)
        return [theirs["seconds"][column] / own["seconds"][column] for own, theirs in pairs]


def markdown(results: dict[str, Any]) -> str:
    table = Table(results)
    rounds = [one for r in results["results"].values() for one in r["rounds"]]
    others = [one["others"] for one in rounds] or [0.0]
    lines = [
        f"{results['model']}, {results['processor']}, {results['threads']} threads,"
        f" {results['rounds']} rounds. Output tokens per second end to end"
        f" ({results['length']} ids in, {results['length']} out, greedy,"
        f" by requests at once) and milliseconds of one prefill of {results['prefill']}: median (least–most)."
        f" Other processes took {median(others):.0%} of the machine meanwhile, {max(others):.0%} at most.",
        "",
    ]
    heads = ["prefill, ms" if c == "prefill" else c for c in table.columns]
    for precision, goals in GOALS.items():
        variants = table.variants(precision)
        if not variants:
            continue
        lines += [
            f"| {precision} | {' | '.join(heads)} | start, s | follows the reference |",
            "|---" * (len(heads) + 3) + "|",
        ]
        for name, result in variants.items():
            cells = [_spread(table.values(result, c), 0) for c in table.columns]
            starts = [one["start_s"] for one in result["rounds"] if one["start_s"] is not None]
            cells.append(f"{median(starts):.1f}" if starts else "–")
            cells.append(_agreement(result))
            lines.append(f"| {name} | {' | '.join(cells)} |")
        for name, result in variants.items():
            if result["engine"] != OURS:
                continue
            cells = []
            for column in table.columns:
                peer = table.best_peer(precision, column)
                ratios = table.ratios(result, variants[peer], column) if peer else []
                cells.append(f"**{_spread(ratios, 2)}** {variants[peer]['engine']}" if peer else "–")
            lines.append(f"| {name} / best peer | {' | '.join(cells)} | | |")
        wanted = [f"≥ {goals[c]}" if c in goals else "" for c in table.columns]
        lines += [f"| goal, demo model | {' | '.join(wanted)} | | |", ""]
    lines += [
        f"{name} failed: {r['error'].splitlines()[0]}"
        for name, r in results["results"].items()
        if "error" in r
    ]
    lines += [
        "The reference is transformers in float32: mean share of a completion before the first"
        " difference, and in brackets the share of completions without one. llama.cpp's times are those of"
        " llama-batched-bench, prompts and decode steps added up, without sampling, text or transport. int4"
        " as a precision: all weights of about 4 bits, whatever their format. KV caches: asyncengine's and"
        " llama.cpp's have 16 bits but where int8 is said, openvino's has 8, its default. Ratios are medians"
        " of the rounds' ratios.",
        "",
    ]
    return "\n".join(lines)


def _spread(values: list[float], digits: int) -> str:
    if not values:
        return "–"
    return f"{median(values):,.{digits}f} ({min(values):,.{digits}f}–{max(values):,.{digits}f})"


def _agreement(result: dict[str, Any]) -> str:
    if "agreement" not in result:
        return "not told"
    return f"{result['agreement']['tokens']:.0%} ({result['agreement']['whole']:.0%})"


def svg(results: dict[str, Any]) -> str:
    """One panel per precision and column, one bar per variant; taller is faster, also of the prefill."""
    table = Table(results)
    width, height, margin, label = 230, 150, 40, 110
    rows = [precision for precision in GOALS if table.variants(precision)]
    total = (margin + (width + margin) * len(table.columns), margin + (height + label + margin) * len(rows))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{total[0]}" height="{total[1]}"'
        ' font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for row, precision in enumerate(rows):
        for index, column in enumerate(table.columns):
            left, top = margin + (width + margin) * index, margin + (height + label + margin) * row
            title = f"prefill of {results['prefill']}" if column == "prefill" else f"{column} requests"
            parts.append(
                f'<text x="{left}" y="{top - 8}" font-weight="bold">{precision}, {title}, tokens/s</text>'
            )
            parts += _panel(table, precision, column, left, top, width, height)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(
    table: Table, precision: str, column: str, left: float, top: float, width: float, height: float
) -> list[str]:
    speeds = {}
    for name, result in table.variants(precision).items():
        values = table.values(result, column)
        if column == "prefill":
            values = [1000 * table.results["prefill"] / ms for ms in values]
        speeds[name] = (result["engine"], median(values), min(values), max(values))
    most = max(high for *_, high in speeds.values())
    step, floor = width / len(speeds), top + height
    parts = [f'<line x1="{left}" y1="{floor}" x2="{left + width}" y2="{floor}" stroke="black"/>']
    for index, (name, (engine, middle, low, high)) in enumerate(speeds.items()):
        x, y = left + index * step, floor - height * middle / most
        centre = x + step / 2
        ends = (floor - height * low / most, floor - height * high / most)
        parts += [
            f'<rect x="{x + step * 0.15:.1f}" y="{y:.1f}" width="{step * 0.7:.1f}" height="{floor - y:.1f}"'
            f' fill="{COLOURS[engine]}"/>',
            f'<path d="M{centre:.1f} {ends[0]:.1f}V{ends[1]:.1f}" stroke="black"/>',
            f'<text x="{centre:.1f}" y="{min(y, ends[1]) - 3:.1f}" text-anchor="middle">{middle:,.0f}</text>',
            f'<text x="{centre:.1f}" y="{floor + 10}" text-anchor="end"'
            f' transform="rotate(-45 {centre:.1f} {floor + 10})">{escape(name)}</text>',
        ]
    return parts
