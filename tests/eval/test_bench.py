"""The benchmark: its statistics, its two processes, its tables, and what it refuses. Times themselves are not asserted."""

import argparse
import io
import json
import stat
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from eval.__main__ import main
from eval.bench import LENGTHS, QUICK_LENGTHS, add_arguments, zoology_peer
from eval.bench.compare import allocators, parse_cases, parse_peer, pool, ratios
from eval.bench.measure import check, plan, remarks, report
from eval.bench.op_forms import OPS, Size, plain_attention, sum_of_keys
from eval.bench.op_worker import compile_form, normal_arrays, times
from eval.bench.ops import measure_op
from eval.bench.ops import take_turns as workers_take_turns
from eval.bench.tables import by_length, defeats, findings, op_tables, parts_table, step_table
from eval.bench.timing import machine, milliseconds, spread, take_turns
from eval.bench.train_step import Case, set_up
from eval.bench.worker import KEEP_FREED_MEMORY, Worker
from pallas_kernels.based import based, prefix_based
from pallas_kernels.linear_attention import linear_attention
from pallas_kernels.long_conv import long_conv
from pallas_kernels.sliding_window import sliding_window
from train.errors import UserError

TINY = Case("based", length=16, batch=2)


def options(*line: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(line)


def text_of(*renderables: object) -> str:
    console = Console(width=160, record=True, file=io.StringIO())
    for renderable in renderables:
        console.print(renderable)
    return console.export_text()


# --- statistics ---


def test_spread_is_median_and_quartiles():
    assert spread([5.0, 1.0, 3.0, 2.0, 4.0]) == (3.0, 2.0, 4.0, 1.0, 5)
    assert spread([7.0]) == (7.0, 7.0, 7.0, 7.0, 1)
    with pytest.raises(ValueError, match="no measurement"):
        spread([])


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2.1, "2100"), (0.0423, "42.3"), (0.00123, "1.23"), (4.5e-7, "0.0004"), (0.0, "0")],
)
def test_milliseconds_keep_three_digits(seconds, text):
    assert milliseconds(seconds) == text


def test_calls_take_turns_after_warming_up():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    timed = take_turns(calls, repeats=3, warmup=2, settle=0.0)
    assert "".join(order) == "aabb" + "ab" * 3
    assert timed["a"]["seconds"]["count"] == timed["b"]["processor"]["count"] == 3


def test_a_slow_call_is_measured_three_times():
    order = []
    take_turns({"slow": lambda: order.append(0)}, repeats=9, warmup=0, enough=0.0, settle=0.0)
    assert len(order) == 3


def test_machine_names_what_a_number_depends_on():
    info = machine()
    assert info["jax"] == jax.__version__
    assert info["cores"] >= 1
    assert json.dumps(info)


# --- the two processes ---


def test_a_worker_answers_until_it_is_closed():
    served = """
        from eval.bench.worker import serve
        print("noise of an import")
        def answer(**request):
            print("noise of a step")
            return {"double": 2 * request["x"]}
        serve({"side": "test"}, answer)
    """
    with Worker("test", [sys.executable, "-c", textwrap.dedent(served)], {"A": "1"}) as worker:
        assert worker.ready == {"side": "test"}
        assert [worker.ask(x=x)["double"] for x in (1, 4)] == [2, 8]
    assert worker._process.returncode == 0


def test_a_worker_that_fails_says_why():
    broken = "import sys; print('{}', flush=True); input(); sys.exit('out of luck')"
    with (
        Worker("zoology", [sys.executable, "-c", broken]) as worker,
        pytest.raises(UserError, match="zoology ended with code 1: out of luck"),
    ):
        worker.ask(steps=1)
    with pytest.raises(UserError, match=r"zoology ended with code 1: .*No module named 'absent'"):
        Worker("zoology", [sys.executable, "-c", "import absent"])
    with pytest.raises(UserError, match="does not start"):
        Worker("zoology", ["/dev/null/python"])


@pytest.fixture
def fake_peer(tmp_path):
    """An interpreter that says it is the peer, whatever script it is given, and a folder that looks like a checkout."""
    checkout = tmp_path / "zoology"
    (checkout / "zoology").mkdir(parents=True)
    (checkout / "zoology" / "model.py").touch()
    script = tmp_path / "python"
    script.write_text(
        f"#!{sys.executable}\n"
        + textwrap.dedent("""
            import json, sys
            ready = {"parameters": 1, "threads": 2, "versions": {"torch": "0.0"}, "command": sys.argv[1:]}
            print(json.dumps(ready), flush=True)
            for line in sys.stdin:
                steps = json.loads(line)["steps"]
                print(json.dumps({"seconds": [1e3] * steps, "processor": [2e3] * steps}), flush=True)
        """)
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return ["--peer_python", str(script), "--zoology", str(checkout)]


def test_a_comparison_from_the_command_line(fake_peer, tmp_path, capsys):
    out = tmp_path / "steps.json"
    case = ["--mixers", TINY.mixer, "--shapes", TINY.shape, "--rounds", "1"]
    line = [*fake_peer, *case, "--steps_per_call", "2", "--breakdown", "--json", str(out)]
    assert main(["bench", *line]) == 0
    (row,) = json.loads(out.read_text())["train_step"]
    assert row["ratio"]["single"]["seconds"] > 10  # the fake needs 1000 s a step
    assert row["times"]["single"]["seconds"]["count"] == 8
    assert row["times"]["several"]["seconds"]["count"] == 3
    assert row["times"]["peer"]["seconds"]["median"] == 1e3
    assert row["ours"]["parameters"] == 539_584
    assert "--mixer based --length 16 --batch 2" in " ".join(row["peer"]["command"])
    assert {"data generation", "optimiser", "loss and gradient"} <= set(row["parts"])
    printed = capsys.readouterr().out
    assert "Training step" in printed
    assert "Parts of our step, based 16 x 2" in printed
    assert "not the same model, 539584 parameters beside 1" in printed
    assert "nobody else was faster" in printed


def test_a_peer_that_breaks_is_one_line(tmp_path):
    args = options("--shapes", "16x2", "--peer_python", "/bin/false", "--zoology", str(tmp_path))
    (tmp_path / "zoology").mkdir()
    (tmp_path / "zoology" / "model.py").touch()
    peer = parse_peer(args)
    with pytest.raises(UserError, match="zoology ended with code 1"):
        Worker("zoology", peer.command(TINY))


@pytest.mark.parametrize(("mixer", "parameters"), [("attention", 545_984), ("based", 539_584)])
def test_the_cases_have_the_original_parameters(mixer, parameters):
    """Counts printed by zoology_peer.py for the original's models."""
    setup = set_up(Case(mixer, 64, 256))
    shapes = jax.tree.leaves(setup.training.abstract.params)
    assert sum(x.size for x in shapes) == parameters
    assert setup.config.model.embed_dropout == 0


# --- the peer's script, as far as it goes without torch ---


def test_the_peer_script_needs_a_checkout(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        zoology_peer.parse(["--zoology", str(tmp_path)])
    assert stop.value.code == 2
    assert "not a checkout" in capsys.readouterr().err


def test_stand_ins_only_for_what_is_missing(monkeypatch):
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    zoology_peer.stand_in("nowhere_to_be_found.ops", Thing=int)
    import nowhere_to_be_found.ops as ops  # pyright: ignore[reportMissingImports]

    assert ops.Thing is int
    zoology_peer.stand_in("json", loads=None)
    assert json.loads("1") == 1


# --- ops ---


SMALL = Size(12, window=5, heads=2)
REFERENCES = {
    "based": lambda *x: based(*x, implementation="reference")[0],
    "linear_attention": lambda q, k, v, raw: linear_attention(
        q, k, v, log_decay=-0.1 * jax.nn.softplus(raw), implementation="reference"
    )[0],
    "attention": lambda *x: sliding_window(*x, window=12, implementation="reference"),
    "sliding_window": lambda *x: sliding_window(*x, window=5, implementation="reference"),
    "long_conv": lambda *x: long_conv(*x, implementation="reference"),
    "softmax": lambda *x: sliding_window(*x, window=12, implementation="reference"),
    "prefix": lambda *x: prefix_based(*x, prefix_length=jnp.array([6]), implementation="reference")[
        0
    ],
}


@pytest.mark.parametrize("name", sorted(OPS))
def test_forms_compute_the_same(name):
    for form, (call, shapes, _) in OPS[name].forms(SMALL).items():
        arrays = normal_arrays(shapes(SMALL), SMALL)
        expected = REFERENCES.get(form, REFERENCES[name])(*arrays)
        error = jnp.max(jnp.abs(call(*arrays) - expected)) / jnp.max(jnp.abs(expected))
        assert error < 1e-5, form  # float32, sums of 12 terms


@pytest.mark.parametrize("name", sorted(OPS))
def test_decoding_continues_the_sequence(name):
    """Token by token through `decode`, from nothing, is one call; a cache is complete once it has been written all over."""
    size = SMALL._replace(window=12)
    for form, (call, shapes, decode) in OPS[name].forms(size).items():
        if decode is None:
            continue
        arrays = normal_arrays(shapes(size), size)
        step, carry = decode(size)
        for i in range(size.length):
            carry, y = step(carry, *(x[:, i : i + 1] for x in arrays))
        expected = call(*arrays)[:, -1:]
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5, err_msg=form)


def test_plain_attention_window_one_is_the_value():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 6, 2, 4))
    np.testing.assert_allclose(plain_attention(q, k, v, window=1), v, rtol=1e-6)


@pytest.mark.parametrize("window", [1, 5, 12, 40])
def test_pairs_are_counted(window):
    i = np.arange(12)
    seen = (i[:, None] >= i) & (i[:, None] < i + window)
    assert sum_of_keys(12, window) == seen.sum()


@pytest.mark.parametrize("name", sorted(OPS))
def test_work_grows_with_the_length(name):
    one, two = (SMALL._replace(length=n) for n in (2048, 4096))
    for direction in ("forward", "forward+backward"):
        small, large = (OPS[name].work(size, direction) for size in (one, two))
        growth = large.flops / small.flops
        assert growth == pytest.approx(4 if name == "attention" else 2, rel=0.1)
        assert large.bytes / small.bytes == pytest.approx(2, rel=0.02)  # one state beside them
    assert OPS[name].work(one, "forward").flops < OPS[name].work(one, "forward+backward").flops


def test_a_form_is_compiled_for_every_direction():
    form = OPS["based"].forms(SMALL)["chunked"]
    for direction, units in (("forward", 1), ("forward+backward", 1), ("decode", 32)):
        compiled = compile_form(form, SMALL, direction)
        assert compiled is not None
        assert compiled.units == units
        taken = times(compiled, calls=2, settle=0.0)
        assert len(taken["seconds"]) == len(taken["processor"]) == 2
    assert compile_form(OPS["based"].forms(SMALL)["plain"], SMALL, "decode") is None


def test_an_op_is_measured_at_every_length(capsys):
    """Real processes, one per form."""
    result = measure_op("long_conv", (8, 16), 1, memory_gib=1.0, size=SMALL)
    assert len(result["rows"]) == 2 * 2 * 3  # no decoding
    rows = by_length(result, "forward+backward")
    assert list(rows) == [8, 16]
    assert rows[8]["fft"]["seconds"]["count"] == 1
    assert 0 < rows[8]["fft"]["fraction"] < 1
    assert json.dumps(result)
    assert any("t(16)/t(8)" in line for line in findings(result))


class FakeSide(Worker):
    def __init__(self, answer):
        self.answer, self.asked = answer, 0

    def ask(self, **request):
        self.asked += 1
        return self.answer


def test_forms_that_do_not_fit_are_asked_once():
    quick = FakeSide({"temporary": 1, "seconds": [1.0], "processor": [2.0]})
    slow = FakeSide({"temporary": 1, "seconds": [99.0], "processor": [2.0]})
    large, neither = FakeSide({"temporary": 7}), FakeSide({})
    sides = {"quick": quick, "slow": slow, "large": large, "neither": neither}
    taken = workers_take_turns(sides, {"length": 8, "direction": "forward"}, repeats=5)
    assert [side.asked for side in sides.values()] == [5, 3, 1, 1]
    assert taken["large"] == {"temporary": 7}
    assert "neither" not in taken
    assert taken["quick"]["processor"]["median"] == 2.0


# --- tables ---


def op_result(times: dict[int, dict[str, float | None]]) -> dict:
    """A result with equal times in both directions; None did not fit."""
    rows = [
        {"length": n, "direction": direction, "form": form, "temporary": 100 * n}
        | ({} if t is None else {"seconds": spread([t])._asdict()})
        for n, forms in times.items()
        for direction in ("forward", "forward+backward")
        for form, t in forms.items()
    ]
    return {"op": "based", "what": "b=1", "dtype": "float32", "absent": {}, "rows": rows}


RESULT = op_result(
    {
        512: {"chunked": 2.0, "quadratic": 1.0, "plain": 0.8},
        1024: {"chunked": 4.2, "quadratic": 8.4, "plain": 16.8},
        2048: {"chunked": 8.4, "quadratic": None, "plain": None},
    }
)


def test_findings_name_crossing_growth_and_ratios():
    lines = findings(RESULT)
    assert "forward: chunked is faster than quadratic from length 1024 on" in lines
    assert (
        "forward+backward at 1024: chunked is 2.00x quadratic; quadratic takes 0.50 of plain"
        in lines
    )
    assert "forward: chunked t(2048)/t(1024) = 2.00, memory x2.00" in lines
    assert not any("at 2048" in line for line in lines)


def test_defeats_are_listed():
    row = step_row(ratio=0.5)
    lines = defeats([row], [RESULT])
    assert lines[0].startswith("training step based 16 x 2, default allocator: zoology is 2.00x")
    assert "based forward at 512: plain is 1.25x quadratic, our fastest" in lines
    assert len(lines) == 2 + 2
    assert defeats([step_row(ratio=2.0)], []) == []


def step_row(ratio: float | None) -> dict:
    sides = {"single": 1.0, "several": 1.0} | ({} if ratio is None else {"peer": ratio})
    times = {side: pool([{"seconds": [t], "processor": [t]}]) for side, t in sides.items()}
    worker = {"parameters": 1, "dtype": "float32", "machine": {"jax": "1"}}
    peer = {"parameters": 1, "threads": 2, "versions": {"torch": "2"}}
    return {
        **TINY._asdict(),
        "allocator": "default",
        "steps_per_call": 8,
        "times": times,
        "ratio": ratios(times),
        "ours": worker,
        "peer": None if ratio is None else peer,
        "parts": {"optimiser": times["single"]},
    }


def test_tables_show_every_cell():
    alone, beside = step_row(None), step_row(21.5) | {"allocator": "kept"}
    assert alone["ratio"] == {}
    shown = text_of(step_table([alone]), parts_table(alone))
    assert "1000 (1000 1000)" in shown
    assert "100%" in shown
    assert "zoology" not in shown
    assert "allocator" not in text_of(step_table([alone]))
    shown = text_of(step_table([alone, beside]))
    for word in ("zoology", "allocator", "kept", "21.5x"):
        assert word in shown
    assert "too large" in text_of(*op_tables(RESULT))
    assert remarks([alone]) == []
    assert "torch 2 (2 threads)" in remarks([beside])[0]


def test_report_prints_everything():
    console = Console(width=160, record=True, file=io.StringIO(), markup=False)
    report(console, [step_row(0.5)], [RESULT])
    shown = console.export_text()
    assert "where somebody else is faster:" in shown
    assert "temporary" in shown


# --- the command line ---


def test_asked_for_nothing_it_measures_a_quick_set():
    assert plan(options()) == (True, ["based"], QUICK_LENGTHS)
    assert plan(options("--op", "attention")) == (False, ["attention"], LENGTHS)
    assert plan(options("--train_step", "--op", "based", "--lengths", "8")) == (
        True,
        ["based"],
        [8],
    )
    assert plan(options("--peer_python", "p", "--zoology", "z"))[:2] == (True, [])


def test_cases_are_every_mixer_at_every_shape():
    cases = parse_cases(options())
    assert cases == [
        Case(mixer, *shape) for shape in ((64, 256), (256, 64)) for mixer in ("attention", "based")
    ]
    assert dict(allocators("both")) == {"default": {}, "kept": KEEP_FREED_MEMORY}
    assert [name for name, _ in allocators("kept")] == ["kept"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--shapes", "64"], "is not LENGTHxBATCH"),
        (["--shapes", "0x4"], "is not LENGTHxBATCH"),
        (["--shapes", "15x4"], "even length >= 16"),
        (["--mixers", "hyena"], "has no peer to compare with; use attention, based"),
        (["--peer_python", "p"], "go together"),
        (["--peer_python", "nowhere", "--zoology", "."], "nowhere is not a file"),
        (["--peer_python", sys.executable, "--zoology", "."], "not a checkout of HazyResearch"),
        (["--rounds", "0"], "--rounds must be at least 1, not 0"),
        (["--repeats", "0"], "--repeats must be at least 1"),
        (["--memory", "0"], "--memory must be positive"),
        (["--lengths", "64", "-1"], "--lengths are positive, not -1"),
        (["--json", "."], "is a directory"),
        (["--json", "nowhere/x.json"], "there is no directory nowhere"),
        (["--op", "matmul"], "invalid choice: 'matmul'"),
    ],
)
def test_bad_arguments_are_one_line_before_anything_runs(line, message, capsys, monkeypatch):
    never = lambda *_: pytest.fail("measured something")
    monkeypatch.setattr("eval.bench.measure.compare", never)
    monkeypatch.setattr("eval.bench.measure.measure_op", never)
    assert main(["bench", *line]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_numbers_measured_before_an_interruption_are_kept(tmp_path, monkeypatch):
    out = tmp_path / "ops.json"
    measured = iter([RESULT])

    def one_then_stop(*_):
        try:
            return next(measured)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr("eval.bench.measure.measure_op", one_then_stop)
    assert main(["bench", "--op", "based", "attention", "--json", str(out)]) == 130
    assert len(json.loads(out.read_text())["ops"]) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["ops.json"]


def test_check_accepts_the_defaults(tmp_path):
    check(options("--json", str(tmp_path / "x.json")))
