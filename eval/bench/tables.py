"""What was measured, as tables, as sentences, and the cases where somebody else is faster."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from eval.bench.op_forms import DIRECTIONS
from eval.bench.ops import PEERS
from eval.bench.timing import milliseconds

OTHERS = ("plain", "jax.nn", "softmax", *PEERS)  # forms of an op that are not ours
Rows = Mapping[int, Mapping[str, Mapping[str, Any]]]  # length -> form -> row


def with_quartiles(seconds: Mapping[str, float]) -> str:
    """Milliseconds: median and, in brackets, quartiles."""
    median, lower, upper = (milliseconds(seconds[key]) for key in ("median", "lower", "upper"))
    return f"{median} ({lower} {upper})"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def step_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One line per case; the peer's columns, and which allocator, only where there is something to say."""
    several = f"{rows[0]['steps_per_call']} a call"
    has_peer = any(row["ratio"] for row in rows)
    has_choice = len({row["allocator"] for row in rows}) > 1
    table = _table(
        "Training step, milliseconds: median (quartiles)",
        *("mixer", "length x batch", *(["allocator"] * has_choice), "1 a call", several),
        *(["zoology", "ratio", f"ratio, {several}", "ratio of processor time"] * has_peer),
    )
    for row in rows:
        times, ratio = row["times"], row["ratio"]
        cells = [row["mixer"], f"{row['length']} x {row['batch']}"]
        cells += [row["allocator"]] * has_choice
        cells += [with_quartiles(times[side]["seconds"]) for side in ("single", "several")]
        if ratio:
            cells += [with_quartiles(times["peer"]["seconds"])]
            cells += [f"{ratio[side]['seconds']:.1f}x" for side in ("single", "several")]
            cells += [f"{ratio['single']['processor']:.1f}x"]
        table.add_row(*cells)
    return table


def parts_table(row: Mapping[str, Any]) -> Table:
    """Where the time of one case goes; the parts are programs of their own, so their sum is not the step."""
    whole = row["times"]["single"]["seconds"]
    name = f"{row['mixer']} {row['length']} x {row['batch']}, {row['allocator']} allocator"
    table = _table(f"Parts of our step, {name}", "part", "ms (quartiles)", "of a step")
    for part, times in row["parts"].items():
        share = times["seconds"]["median"] / whole["median"]
        table.add_row(part, with_quartiles(times["seconds"]), f"{share:.0%}")
    table.add_row("whole step, 1 a call", with_quartiles(whole), "100%")
    table.columns[0].justify = "left"
    return table


def op_tables(result: Mapping[str, Any]) -> list[Table]:
    """A line per length, a column per form: time and share of the roofline per direction, temporary memory with backward."""
    tables = []
    for direction in DIRECTIONS:
        lengths = by_length(result, direction)
        forms = [
            form for form in forms_of(result) if any(form in rows for rows in lengths.values())
        ]
        if not forms:
            continue
        per = "ms a token" if direction == "decode" else "ms"
        title = f"{result['op']} ({result['what']}, {result['dtype']}), {direction}, {per} (quartiles), of the roofline"
        table = _table(title, "length", *forms)
        for length, rows in lengths.items():
            table.add_row(str(length), *(_cell(rows.get(form)) for form in forms))
        tables.append(table)
    forms = forms_of(result)
    lengths = by_length(result, "forward+backward")
    table = _table(
        f"{result['op']}, forward+backward, temporary memory, MiB",
        *("length", *(form for form in forms if form not in PEERS)),
    )
    for length, rows in lengths.items():
        cells = (rows[form]["temporary"] / 2**20 for form in forms if form not in PEERS)
        table.add_row(str(length), *(f"{mib:.1f}" for mib in cells))
    return [*tables, table]


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "-"
    if "seconds" not in row:
        return "too large"
    share = f" {row['fraction']:.0%}" if "fraction" in row else ""
    return with_quartiles(row["seconds"]) + share


def forms_of(result: Mapping[str, Any]) -> list[str]:
    """In the order of `op_forms`: the form with linear memory, the quadratic one, then the others."""
    return list(dict.fromkeys(row["form"] for row in result["rows"]))


def by_length(result: Mapping[str, Any], direction: str) -> Rows:
    """length -> form -> row, of one direction."""
    lengths: dict[int, dict[str, dict[str, Any]]] = {}
    for row in result["rows"]:
        if row["direction"] == direction:
            lengths.setdefault(row["length"], {})[row["form"]] = row
    return lengths


def findings(result: Mapping[str, Any]) -> list[str]:
    """Sentences about one op: where forms cross, how they stand to each other, how time and memory grow."""
    linear, square, *_ = forms_of(result)
    sentences = []
    for direction in DIRECTIONS[:2]:
        rows = by_length(result, direction)
        faster = [n for n in rows if (ratio(rows, n, square, n, linear) or 0) > 1]
        crossing = f"from length {min(faster)} on" if faster else "at no length measured"
        sentences.append(f"{direction}: {linear} is faster than {square} {crossing}")
        for n in rows:
            gain = ratio(rows, n, square, n, linear)
            beside = ratio(rows, n, square, n, "plain")
            if gain:
                plain = f"; {square} takes {beside:.2f} of plain" if beside else ""
                sentences.append(f"{direction} at {n}: {linear} is {gain:.2f}x {square}{plain}")
            for other in ("softmax", *PEERS):
                gain = ratio(rows, n, other, n, linear)
                if gain:
                    sentences.append(f"{direction} at {n}: {linear} is {gain:.2f}x {other}")
            cost = ratio(rows, n, "prefix", n, linear)
            if cost:
                sentences.append(f"{direction} at {n}: prefix takes {cost:.2f} of {linear}")
        for n in rows:
            growth = ratio(rows, 2 * n, linear, n, linear)
            if growth:
                before, after = (rows[m][linear]["temporary"] for m in (n, 2 * n))
                memory = f", memory x{after / before:.2f}" if before else ""
                sentences.append(f"{direction}: {linear} t({2 * n})/t({n}) = {growth:.2f}{memory}")
    return sentences + [f"{peer} is not measured: {why}" for peer, why in result["absent"].items()]


def ratio(rows: Rows, n: int, form: str, other_n: int, other: str) -> float | None:
    """Median of one cell over that of another; None where either was not measured."""
    times = [
        rows.get(m, {}).get(f, {}).get("seconds", {}).get("median")
        for m, f in ((n, form), (other_n, other))
    ]
    return None if None in times else times[0] / times[1]


def defeats(steps: Sequence[Mapping[str, Any]], ops: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every case where a peer or a plain form is faster than the best of ours."""
    lines = []
    for row in steps:
        name = f"{row['mixer']} {row['length']} x {row['batch']}, {row['allocator']} allocator"
        lines += [
            f"training step {name}: zoology is {1 / r['seconds']:.2f}x ours ({side} step per call)"
            for side, r in row["ratio"].items()
            if r["seconds"] < 1
        ]
    for result in ops:
        ours = [form for form in forms_of(result) if form not in OTHERS]
        for direction in DIRECTIONS:
            rows = by_length(result, direction)
            for n in rows:
                measured = [form for form in ours if "seconds" in rows[n].get(form, {})]
                if not measured:
                    continue
                best = min(measured, key=lambda form: rows[n][form]["seconds"]["median"])
                for other in OTHERS:
                    gain = ratio(rows, n, best, n, other)
                    if gain and gain > 1:
                        where = f"{result['op']} {direction} at {n}"
                        lines.append(f"{where}: {other} is {gain:.2f}x {best}, our fastest")
    return lines
