"""A result as one HTML page that needs nothing else: for readers who know neither the program nor its words."""

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #22272b; max-width: 1060px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.6em; margin-bottom: 0; } h2 { font-size: 1.2em; margin-top: 2.2em; border-top: 1px solid #dde1e4;
padding-top: .8em; } p { max-width: 50em; } .sub { color: #667; margin-top: .2em; }
.verdict { padding: .7em 1em; border-radius: 6px; font-weight: 600; } .good { background: #e3f1e5; color: #23552c; }
.bad { background: #fbe4e2; color: #8a1c15; }
.tiles { display: flex; flex-wrap: wrap; gap: 10px; margin: 1em 0; }
.tile { background: #f3f5f7; border-radius: 6px; padding: .6em 1em; min-width: 9.5em; }
.tile b { display: block; font-size: 1.45em; } .tile span { color: #556; font-size: .87em; }
table { border-collapse: collapse; margin: .8em 0; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .25em .8em; border-bottom: 1px solid #e6e8eb; }
th { font-weight: 600; color: #445; }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
td:not(.text) { white-space: nowrap; } svg { width: 100%; height: auto; }
details { margin: .6em 0; } pre { background: #f3f5f7; padding: 1em; overflow-x: auto; font-size: 12px; }
"""
_WARM_UP = "warm-up"


def write(result: Mapping[str, Any], path: Path) -> None:
    """Write the page of a result."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(result))


def render(result: Mapping[str, Any]) -> str:
    """The page."""
    phases = [phase for phase in result["phases"] if phase["name"] != _WARM_UP]
    main = _main_phase(result, phases)
    parts = [_head(result), _verdict(result, phases)]
    if main is not None:
        parts += [_tiles(result, main), _words(result), _load(result, phases), _latency(result, phases, main)]
        parts += [_names("By task", "task", main, "tasks"), _names("By tenant", "tenant", main, "tenants")]
        parts += [_server(result["phases"]), _agreement(phases), _in_process(result)]
    parts += [_errors(result), _answers(result), _settings(result)]
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Load test</title>'
        f"<style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def _main_phase(result: Mapping[str, Any], phases: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The phase that details are shown of: the one at the knee, else the last that answered anything."""
    answered: list[Any] = [phase for phase in phases if phase["total"]["ok"]]
    knee = result["knee"] and result["knee"]["phase"]
    at_knee = [phase for phase in answered if phase["name"] == knee]
    return (at_knee or answered)[-1] if answered else None


def _head(result: Mapping[str, Any]) -> str:
    server, machine = result["server"], result["machine"]
    build = ", ".join(f"{key} {value}" for key, value in (server["build"] or {}).items())
    return (
        f"<h1>Load test of an mtLoRA server</h1><p class=sub>{_e(result['made'])} · {_e(server['address'])} · "
        f"{server['tasks']} tasks served · {_e(build or 'build unknown')} · {machine['cores']} cores, "
        f"{_e(machine['processor'])}</p>"
    )


def _verdict(result: Mapping[str, Any], phases: Sequence[Mapping[str, Any]]) -> str:
    sent = sum(sum(phase["statuses"].values()) for phase in phases)
    good = result["complete"] and not result["failed"] and not result["wrong"]
    parts = [f"{sent:,} requests sent; {result['failed']:,} failed; {result['wrong']:,} answered wrongly."]
    if not result["complete"]:
        parts.insert(0, "This test did not run to its end; what follows is what it had.")
    if result.get("server_gone"):
        parts.insert(0, "The server could no longer be reached.")
    return f'<p class="verdict {"good" if good else "bad"}">{" ".join(parts)}</p>'


def _tiles(result: Mapping[str, Any], main: Mapping[str, Any]) -> str:
    tiles = []
    knee, inside = result["knee"], result["in_process"]
    if knee and knee["offered_per_second"]:
        more = "" if knee["bounded"] else " or more"
        tiles.append((f"{knee['offered_per_second']:.1f}/s{more}", "knee: highest load within the service level"))
    total = main["total"]
    where = "at the knee" if knee and main["name"] == knee["phase"] else f"in “{main['name']}”"
    tiles += [
        (f"{main['throughput_per_second']:.1f}/s", f"requests answered {where}"),
        (f"{main['completion_tokens_per_second']:.0f}/s", f"tokens written {where}"),
        (_seconds(total["ttft"]["p95"]), f"p95 time to first token {where}"),
        (_seconds(total["e2e"]["p95"]), f"p95 time to the whole answer {where}"),
    ]
    if main["accuracy"] is not None:
        tiles.append((f"{main['accuracy']:.0%}", "answers that are the task's exact one (the model's accuracy)"))
    if inside:
        tiles.append((f"{inside['ratio']:.2f}", "throughput through the server ÷ engine with no server around it"))
    tiles.append((f"{main['generator']['cores']:.1%}", f"of a core: what this load generator itself used {where}"))
    cells = "".join(f"<div class=tile><b>{_e(value)}</b><span>{_e(name)}</span></div>" for value, name in tiles)
    return f"<div class=tiles>{cells}</div>"


def _words(result: Mapping[str, Any]) -> str:
    o = result["settings"]["objective"]
    return (
        "<details open><summary>The words used here</summary><p><b>Offered load</b>: requests a second that were due "
        "to be sent, whether or not the server kept up. <b>Throughput</b>: requests a second that were answered. "
        "<b>Service level</b>: the first token within "
        f"{o['ttft_s']:g} s and the whole answer within {o['e2e_s']:g} s of when the request was due. <b>Goodput</b>: "
        "requests a second that were answered within it. <b>Knee</b>: the highest offered load of which goodput is "
        f"at least {o['goodput_share']:.0%}, with p{100 * o['quantile']:g} of both times within the service level; "
        "above it, requests pile up. <b>p95</b>: 95 of 100 requests were at least this fast. <b>TTFT</b>: time to "
        "first token. <b>ITL</b>: inter-token latency, the time between the pieces of an answer. <b>E2E</b>: end to "
        "end, until the whole answer is there. All times count from when a request was <i>due</i>, so a stall of the "
        "server is not hidden by requests that waited to be sent.</p></details>"
    )


def _load(result: Mapping[str, Any], phases: Sequence[Mapping[str, Any]]) -> str:
    from loadtest import charts

    knee = result["knee"]
    if not knee or not knee["steps"]:
        plain = [
            (p["name"], f"{p['offered_per_second']:.2f}", f"{p['throughput_per_second']:.2f}",
             f"{p['goodput_per_second']:.2f}", f"{p['total']['offered']:,}")
            for p in phases
        ]  # fmt: skip
        columns = ("phase", "offered/s", "answered/s", "within service level/s", "requests")
        return "<h2>Throughput</h2>" + _table(columns, plain)
    at = knee["offered_per_second"]
    rows = [
        (f"{s['offered']:.2f}", f"{s['throughput']:.2f}", f"{s['goodput']:.2f}", _seconds(s["ttft"]),
         _seconds(s["e2e"]), "; ".join(s["breaches"]) or ("holds: the knee" if s["offered"] == at else "holds"))
        for s in sorted(knee["steps"], key=lambda s: s["offered"])
    ]  # fmt: skip
    percent = f"p{100 * result['settings']['objective']['quantile']:g}"
    heads = ("offered/s", "answered/s", "within service level/s", f"TTFT {percent}", f"E2E {percent}", "service level")
    return (
        "<h2>How much load the server holds</h2><p>Requests come at random moments (a Poisson process), more of them "
        "a second in each step. As long as the lines follow the dashed diagonal, the server keeps up.</p>"
        f"{charts.throughput(knee['steps'], at)}{_table(heads, rows, text_columns=(5,))}"
    )


def _latency(result: Mapping[str, Any], phases: Sequence[Mapping[str, Any]], main: Mapping[str, Any]) -> str:
    from loadtest import charts

    made = ["<h2>How long answers take</h2>"]
    steps = [phase for phase in phases if phase["kind"] == "open"]
    if len(steps) > 1:
        knee = result["knee"] and result["knee"]["offered_per_second"]
        made += [
            "<p>Latency as the load grows. Beyond the knee, requests wait for those before them.</p>",
            charts.latency_by_load(steps, result["settings"]["objective"], knee),
        ]
    made.append(f"<p>All requests of “{_e(main['name'])}”: which share was at least as fast as a time.</p>")
    made.append(charts.distribution(main))
    heads = ("latency", "p50", "p90", "p95", "p99", "p99.9", "mean", "measured")
    rows = [
        (name, *(_seconds(main["total"][key][q]) for q in ("p50", "p90", "p95", "p99", "p99.9", "mean")),
         f"{main['total'][key]['count']:,}")
        for name, key in (("time to first token", "ttft"), ("between tokens", "itl"), ("end to end", "e2e"))
        if main["total"][key]["count"]
    ]  # fmt: skip
    made.append(_table(heads, rows))
    return "".join(made)


def _names(title: str, what: str, main: Mapping[str, Any], key: str) -> str:
    from loadtest import charts

    groups = main[key]
    fairness = main["fairness"][key]
    told = (
        f"<h2>{title}</h2><p>“{_e(main['name'])}”, {len(groups)} {_e(key if len(groups) != 1 else what)}. Jain's index "
        f"of fairness: <b>{fairness:.3f}</b>, where 1 means that every {what} had the same share of its requests "
        f"answered within the service level, and 1 ÷ {len(groups)} that one {what} had everything.</p>"
    )
    rows = [
        (name, f"{g['offered']:,}", f"{g['offered'] - g['ok']:,}", f"{g['good']:,}", _seconds(g["ttft"]["p50"]),
         _seconds(g["ttft"]["p95"]), _seconds(g["e2e"]["p50"]), _seconds(g["e2e"]["p95"]),
         f"{g['exact'] / g['scored']:.0%}" if g["scored"] else "–")
        for name, g in charts.top_rows(groups)
    ]  # fmt: skip
    heads = (what, "requests", "not answered", "within service level", "TTFT p50", "TTFT p95", "E2E p50", "E2E p95",
             "exact answers")  # fmt: skip
    table = _table(heads, rows)
    if len(groups) == 1:
        return told + table
    return f"{told}{charts.by_name(groups, what)}<details><summary>As a table</summary>{table}</details>"


def _server(phases: Sequence[Mapping[str, Any]]) -> str:
    from loadtest import charts

    picture = charts.over_time(phases)
    if picture is None:
        return ""
    missed = sum(phase["server"]["missed"] for phase in phases if phase["server"])
    note = f" {missed} readings failed." if missed else ""
    return (
        f"<h2>What the server said meanwhile</h2><p>From its own metrics page, read during the test.{note}</p>{picture}"
    )


def _agreement(phases: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for phase in phases:
        for key, found in ((phase["server"] or {}).get("agreement") or {}).items():
            for quantile, row in found["quantiles"].items():
                to = "more" if row["server_to"] is None else _seconds(row["server_to"])
                rows.append(
                    (phase["name"], {"ttft": "TTFT", "itl": "ITL", "e2e": "E2E"}[key], quantile,
                     _seconds(row["generator"]), f"{_seconds(row['server_from'])} to {to}", str(row["buckets_apart"]),
                     "yes" if row["buckets_apart"] <= 1 else "no")
                )  # fmt: skip
    if not rows:
        return ""
    agree = sum(row[-1] == "yes" for row in rows)
    heads = ("phase", "latency", "quantile", "generator", "server's bucket", "buckets apart", "agree")
    return (
        "<h2>Do generator and server agree?</h2><p>The generator measures from when a request was due; the server "
        "counts into buckets, from when it received the request. They agree where the generator's figure lies in the "
        f"server's bucket or one next to it: <b>{agree} of {len(rows)}</b> do.</p>"
        f"<details><summary>All of them</summary>{_table(heads, rows)}</details>"
    )


def _in_process(result: Mapping[str, Any]) -> str:
    found = result["in_process"]
    if not found:
        return ""
    rows = [
        (r["loop"], f"{r['end_to_end_per_second']:.2f}", f"{r['in_process_per_second']:.2f}", f"{r['ratio']:.3f}")
        for r in sorted(found["rounds"], key=lambda r: [loop["name"] for loop in found["loops"]].index(r["loop"]))
    ]
    medians = [
        (loop["name"], f"{loop['in_flight']:,}", f"{loop['ratio']:.3f}",
         f"{loop['ratio_min']:.3f} to {loop['ratio_max']:.3f}")
        for loop in found["loops"]
    ]  # fmt: skip
    return (
        "<h2>What the server costs</h2><p>The same requests, as many at a time, through the server and through the "
        "engine with no server around it, in turn. <b>At the knee</b>: as many requests under way as there were there "
        "on average; a request's place in the engine then stays empty for the step that begins while its answer is on "
        "its way to the client. <b>Engine full</b>: more are under way than the engine runs at a time, so that none "
        "stays empty. The engine alone gives whole answers; in streams each token is a message of its own.</p>"
        + _table(("closed loop", "in flight", "server ÷ engine alone, median", "rounds"), medians, (0,))
        + "<p>Every round:</p>"
        + _table(("closed loop", "requests/s through the server", "requests/s, engine alone", "ratio"), rows, (0,))
    )


def _errors(result: Mapping[str, Any]) -> str:
    statuses = sorted({status for phase in result["phases"] for status in phase["statuses"]})
    messages = {s: m for phase in result["phases"] for s, m in phase["errors"].items()}
    flaws = [flaw for phase in result["phases"] for flaw in phase["flaws"]]
    rows = [
        (phase["name"], *(f"{phase['statuses'].get(status, 0):,}" for status in statuses), f"{phase['flawed']:,}",
         f"{phase['failed']:,}")
        for phase in result["phases"]
    ]  # fmt: skip
    made = (
        "<h2>Errors, by status</h2><p>Every request ends in a status; OK is an answer. CUT_OFF is what this program "
        "gave up when it was told to end. Beyond the knee, a server that says RESOURCE_EXHAUSTED or misses a deadline "
        "does what it should, so there these do not count as failed.</p>"
        + _table(("phase", *statuses, "incomplete replies", "counted as failed"), rows)
    )
    if messages:
        made += _table(("status", "first message"), sorted(messages.items()), text_columns=(1,))
    return made + ("<p>" + "<br>".join(_e(flaw) for flaw in flaws[:20]) + "</p>" if flaws else "")


def _answers(result: Mapping[str, Any]) -> str:
    found = result["check"]
    if not found:
        return "<h2>Were the answers right?</h2><p>Beyond being complete, answers were not checked.</p>"
    rows = [
        ("the task's exact answer", f"{found['exact']:,}"),
        ("what the server answers to the same input alone", f"{found['same_alone']:,}"),
        ("a tie: departs from it between two tokens almost as likely", f"{found['ties']:,}"),
        ("wrong", f"{found['wrong']:,}"),
        ("not checked", f"{found['unchecked']:,}"),
    ]
    made = (
        "<h2>Were the answers right?</h2><p>A model's answer need not be the task's exact one to be right here: it "
        "must be the answer that this model gives, whatever else the server is busy with. Each answer that is not "
        "exact is compared with what the server says to the same input alone, after the test.</p>"
        if found["how"] == "alone"
        else "<h2>Were the answers right?</h2><p>Every answer had to be the task's exact one.</p>"
    )
    made += _table(("an answer is", "requests"), rows)
    if found["examples"]:
        heads = ("task", "answer under load", "alone", "exact")
        shown = [(x["task"], x["answer"], x["alone"] or "", x["target"] or "") for x in found["examples"]]
        made += _table(heads, shown, text_columns=(1, 2, 3))
    return made


def _settings(result: Mapping[str, Any]) -> str:
    shown = {key: result[key] for key in ("command", "settings", "versions", "machine", "server")}
    text = json.dumps(shown, indent=1, ensure_ascii=False)
    return f"<h2>Settings</h2><details><summary>Everything this test was told</summary><pre>{_e(text)}</pre></details>"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], text_columns: Sequence[int] = ()) -> str:
    def row(tag: str, cells: Sequence[str]) -> str:
        made = (
            f"<{tag}{' class=text' if i in text_columns else ''}>{_e(cell)}</{tag}>" for i, cell in enumerate(cells)
        )
        return f"<tr>{''.join(made)}</tr>"

    return f"<table>{row('th', heads)}{''.join(row('td', each) for each in rows)}</table>"


def _seconds(value: float) -> str:
    """Three digits, in the unit that suits."""
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.3g} ms"


def _e(text: object) -> str:
    return html.escape(str(text))
