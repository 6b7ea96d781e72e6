"""Looks at the live page of a running server as a person would: it loads, it moves, it can be asked, by mouse, keyboard and phone."""

import argparse
import itertools
import json
import os
import subprocess
import sys
import threading
import time

from browser import Browser

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")
PROMPTS = ["In the beginning", "And the LORD spake unto Moses, saying,", "The song of songs, which is Solomon's.", "Now it came to pass"]


class Server:
    """`hardmax serve` on ports of its own. Traces and samples of what it says are left to it."""

    def __init__(self, binary, flags):
        command = [binary, "serve", "--log-format", "json", "--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0",
                   "--model", os.path.join(ROOT, "models/demo"), *flags]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        starting = self._until("starting")
        self.grpc, self.url = starting["grpc"], f"http://{starting['metrics']}/"
        self._until("serving")
        threading.Thread(target=self.process.stderr.read, daemon=True).start()

    def _until(self, message):
        for line in self.process.stderr:
            fields = json.loads(line)["fields"] if line.startswith("{") else {}
            if fields.get("message") == message:
                return fields
        raise RuntimeError(f"the server ended before it said '{message}'")

    def close(self):
        self.process.terminate()
        self.process.wait()


class Traffic:
    """Requests, one after another in each of a few threads, until told to stop."""

    def __init__(self, binary, grpc, threads=3):
        self.stopped = threading.Event()

        def run(number):
            for prompt in itertools.cycle(PROMPTS[number:] + PROMPTS[:number]):
                if self.stopped.is_set():
                    return
                command = [binary, "generate", prompt, "--url", f"http://{grpc}",
                           "--max-new-tokens", str(60 + 40 * number)]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

        self.threads = [threading.Thread(target=run, args=(number,)) for number in range(threads)]
        for thread in self.threads:
            thread.start()

    def stop(self):
        self.stopped.set()
        for thread in self.threads:
            thread.join()


def no_noise(page, url):
    """No error on the console, no failed request, and none that left the port."""
    for method, params in page.drain():
        text = json.dumps(params)
        if method == "Runtime.exceptionThrown":
            raise AssertionError(f"exception: {text}")
        if method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            raise AssertionError(f"console: {text}")
        if method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            raise AssertionError(f"log: {text}")
        if method == "Network.loadingFailed" and not params.get("canceled"):
            raise AssertionError(f"request failed: {text}")
        if method == "Network.requestWillBeSent":
            asked = params["request"]["url"]
            assert asked.startswith((url, "data:")), f"a request left the port: {asked}"
        if method == "Network.responseReceived":
            assert params["response"]["status"] < 400, f"refused: {params['response']['url']} {params['response']['status']}"


def functions(page):
    """The arithmetic of the page, on cases with known answers."""
    buckets = lambda *count: json.dumps({"le": [1, 2, 4, None], "count": count})  # noqa: E731
    cases = [
        (f"quantile(null, {buckets(0, 10, 10, 10)}, 0.5)", 1.5),
        (f"quantile({buckets(5, 5, 5, 5)}, {buckets(5, 5, 9, 9)}, 0.25)", 2.5),
        (f"quantile({buckets(1, 1, 1, 1)}, {buckets(1, 1, 1, 1)}, 0.5)", None),
        (f"quantile(null, {buckets(0, 0, 0, 3)}, 0.95)", 4),
        ("rate({uptime_seconds: 1, counters: {n: 10}}, {uptime_seconds: 3, counters: {n: 30}}, 'n')", 10),
        ("rate({uptime_seconds: 9, counters: {n: 10}}, {uptime_seconds: 1, counters: {n: 3}}, 'n')", None),
        ("rate(undefined, {uptime_seconds: 1, counters: {n: 3}}, 'n')", None),
        ("shares([1, 3, 0, 4]).join()", "0.5,1.5,0,2"),
        ("shares([0, 0]).join()", "0,0"),
        ("[0.00025, 0.0123, 2.5, null].map((s) => duration(s).join('')).join(' ')", "250µs 12.3ms 2.5s –"),
        ("figure(1234567, 9)", "1,234,567"),
    ]
    for expression, expected in cases:
        found = page.eval(expression)
        assert found == expected, f"{expression} is {found}, not {expected}"


def contrast(page):
    """Every text against what is behind it, as WCAG counts it: 4.5 for text of this size. Once colours have settled."""
    time.sleep(0.7)
    bad = page.eval("""(() => {
      const parse = (c) => { const m = c.match(/[\\d.]+/g).map(Number); return c.startsWith('color(') ? [m[0] * 255, m[1] * 255, m[2] * 255, m[3] ?? 1] : [m[0], m[1], m[2], m[3] ?? 1]; };
      const back = (e) => { for (; e; e = e.parentElement) { const s = getComputedStyle(e); const c = parse(s.backgroundColor); if (c[3] > 0.99) return c; } return [255, 255, 255, 1]; };
      const found = [];
      for (const e of document.querySelectorAll('body *')) {
        if (e.closest('svg, .vh, .skip, option, script, [hidden]') || !e.checkVisibility()) continue;
        if (![...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim())) continue;
        const style = getComputedStyle(e);
        if (parseFloat(style.fontSize) === 0) continue;
        const [a, b] = [luminance(parse(style.color)), luminance(back(e))].sort((x, y) => y - x);
        const ratio = (a + 0.05) / (b + 0.05);
        if (ratio < 4.5) found.push(`${e.tagName}.${e.className} '${e.textContent.slice(0, 20)}' ${ratio.toFixed(2)}`);
      }
      return found;
    })()""")
    assert not bad, f"too little contrast: {bad}"


def names(page):
    """Landmarks, and a name for everything that can be operated."""
    for landmark in ("header", "main", "footer"):
        assert page.eval(f"document.querySelectorAll('body > {landmark}').length") == 1, landmark
    nameless = page.eval("""[...document.querySelectorAll('input, select, textarea, button, [tabindex="0"], section, [role=img]')].filter((e) => {
      const by = e.getAttribute('aria-labelledby');
      return !(e.getAttribute('aria-label') || (by && document.getElementById(by)) || e.labels?.length || e.textContent.trim());
    }).map((e) => e.outerHTML.slice(0, 80))""")
    assert not nameless, f"without a name: {nameless}"
    twice = page.eval("(() => { const ids = [...document.querySelectorAll('[id]')].map((e) => e.id); return ids.filter((id, i) => ids.indexOf(id) !== i && !/^(legend|clip|g|top)/.test(id)); })()")
    assert not twice, f"ids that are there twice: {twice}"


def reachable(page):
    """What Tab comes to, from the top of the page on."""
    page.eval("document.activeElement.blur(), window.scrollTo(0, 0)")
    found = []
    for _ in range(40):
        page.key("Tab")
        found.append(page.eval("(() => { const e = document.activeElement; return e.name || e.id || e.className || e.tagName; })()"))
    for control in ("skip", "theme", "heat-frame", "scope", "gap-scope", "try-prompt", "routing", "try-tokens", "try-go"):
        assert control in found, f"Tab does not reach {control}: {found}"


def try_prompt(page, prompt="In the beginning", tokens="24", routing=""):
    page.eval(f"$('try-prompt').value = {json.dumps(prompt)}, $('try-tokens').value = {json.dumps(tokens)}")
    page.click(f"input[name=routing][value='{routing}']")
    page.eval("trial.answer = null")
    page.click("#try-go")
    page.until("trial.answer !== null && trial.abort === null")


def prompts(page):
    try_prompt(page)
    assert page.eval("trial.answer.tokens.filter((t) => t.generated).length") == 24
    assert page.eval("trial.answer.tokens.every((t, i, all) => t.routes || i === all.length - 1)"), "every token but the last has its experts"
    colours = page.eval("new Set([...document.querySelectorAll('.token')].map((e) => getComputedStyle(e).backgroundColor)).size")
    assert colours > 2, "tokens of different experts look different"
    before = page.eval("document.querySelector('#tokens').textContent")
    page.eval("$('layer').value = '1', $('layer').dispatchEvent(new Event('change'))")
    assert page.eval("document.querySelector('#tokens').textContent") != before, "another layer, other experts"

    # A token's own figures, by keyboard and by mouse.
    page.eval("document.querySelector('.token').focus()")
    page.key("ArrowRight")
    assert page.eval("document.activeElement.dataset.token") == "1"
    assert "position 1" in page.eval("$('details').textContent")
    page.click(".token[data-token='4']")
    assert "position 4" in page.eval("$('details').textContent")

    try_prompt(page, routing="soft")
    assert page.eval("trial.answer.routing") == "soft"
    assert page.eval("trial.answer.tokens[0].routes[0].length") == 8, "all experts of the demo"
    try_prompt(page, routing="top-2")
    assert page.eval("trial.answer.tokens[0].routes[0].length") == 2

    # Model text is text.
    try_prompt(page, prompt="<img src=x onerror=alert(1)> & <b>bold</b>", tokens="2")
    assert page.eval("document.querySelectorAll('#tokens img, #tokens b').length") == 0
    assert "<img" in page.eval("trial.answer.tokens.map((t) => t.text).join('')")


def refusals(page):
    """What is wrong is said beside the field that is wrong."""
    for prompt, tokens, said, field in [("", "8", "write something", "try-prompt"), ("a", "0", "whole number", "try-tokens"),
                                        ("a", "300", "256", "try-tokens"), ("word " * 3900, "8", "tokens", "try-prompt")]:
        page.eval(f"$('try-prompt').value = {json.dumps(prompt)}, $('try-tokens').value = '{tokens}'")
        page.click("#try-go")
        page.until(f"$('try-error').textContent.includes({json.dumps(said)}) && trial.abort === null")
        assert page.eval(f"$('{field}').getAttribute('aria-invalid') === 'true' && document.activeElement.id === '{field}'"), field
    # No button asks for what the demo has not; a page of another model might.
    button = "document.querySelector('input[name=routing][value^=top-]')"
    page.eval(f"$('try-prompt').value = 'a', $('try-tokens').value = '8', {button}.checked = true, {button}.value = 'top-99'")
    page.click("#try-go")
    page.until("$('try-error').textContent.startsWith('The routing: k: 99 is not') && trial.abort === null")
    assert page.eval(f"$('try-routing').getAttribute('aria-invalid') === 'true' && document.activeElement === {button}")
    page.eval(f"{button}.value = 'top-1'")


def desktop(page, server, traffic, shots):
    page.open(server.url, width=1280, height=900)
    page.until("$('health-text').textContent === 'serving'")
    assert page.eval("Boolean(window.Plotly)"), "the charts' library is there"
    functions(page)
    names(page)
    reachable(page)
    contrast(page)

    quiet = page.eval("$('t-generated-sub').textContent")
    traffic.append(Traffic(server.binary, server.grpc))
    page.until("answers.length > 1 && rate(answers.at(-2), answers.at(-1), 'generated_tokens') > 0")
    assert page.eval("$('t-generated-sub').textContent") != quiet
    line = "document.querySelector('#through-plot .scatterlayer .js-line').getAttribute('d')"
    page.until("document.querySelector('#through-plot .scatterlayer .js-line')")
    drawn = page.eval(line)
    page.until(f"{line} !== {json.dumps(drawn)}")
    cell = "[...document.querySelectorAll('#heat .cell')].map((e) => e.style.background + e.textContent).join()"
    page.until(f"new Set({cell}.split(',')).size > 4")
    cells = page.eval(cell)
    page.until(f"{cell} !== {json.dumps(cells)}")
    page.click("input[name=scope][value=total]")
    assert page.eval("heat.scope()") == "total"
    page.click("input[name=scope][value=window]")
    assert page.eval("heat.scope()") == "window"
    page.eval("$('heat-frame').focus()")
    page.key("ArrowRight")
    page.key("ArrowDown")
    assert "Layer 1, expert 0" in page.eval("$('heat-said').textContent")

    assert page.eval("$('gap-plot').hidden === $('gap-legend').hidden")
    page.until("fidelity !== null && document.querySelector('#gap-plot .bars')", timeout=60)
    assert page.eval("$('gap-empty').hidden && document.querySelectorAll('#gap-table tbody tr').length") == 4, "a row for each layer"
    for scope in ("total", "window"):
        page.click(f"input[name=gap-scope][value={scope}]")
        assert page.eval(f"fidelity === answers.at(-1).fidelity.{scope}"), scope
        assert "In the last" in page.eval("$('gap-basis').textContent")

    prompts(page)
    no_noise(page, server.url)
    # Refused prompts are answers with an error status, which the browser logs; nothing else may be said.
    refusals(page)
    page.drain().clear()

    page.until(f"points.length > {shots.points}", timeout=300)
    try_prompt(page, prompt="In the beginning", tokens="64", routing="top-2")
    page.eval("document.activeElement.blur()")
    shots.take(page, "page-light")
    page.click("input[name=theme][value=dark]")
    assert page.eval("getComputedStyle(document.body).color") != "rgb(26, 29, 33)"
    contrast(page)
    shots.take(page, "page-dark")
    page.click("input[name=theme][value=auto]")
    page.colours(dark=True)
    page.until("document.documentElement.dataset.theme === 'dark'")
    page.colours(dark=False)
    page.until("document.documentElement.dataset.theme === 'light'")
    contrast(page)
    no_noise(page, server.url)


def phone(page, server, shots):
    page.open(server.url, width=360, height=740, scale=2, touch=True)
    page.until(f"$('health-text').textContent === 'serving' && points.length > {shots.points}", timeout=300)
    try_prompt(page, tokens="40")
    wide = page.eval("[document.documentElement.scrollWidth, innerWidth]")
    assert wide[0] <= wide[1] == 360, f"the page scrolls sideways: {wide}"
    small = page.eval("[...document.querySelectorAll('.choice label, #try-go, #layer')].filter((e) => e.getBoundingClientRect().height < 24).length")
    assert small == 0, "something is too small for a finger"
    no_noise(page, server.url)
    page.eval("document.activeElement.blur(), window.scrollTo(0, 0)")
    shots.take(page, "page-phone")


# From the next answer on, a page hears of another model, whose load and gap change with every answer.
PRETEND = """((layers, experts) => {
  const real = answers.at(-1), many = (n, make) => Array.from({ length: n }, (_, i) => make(i));
  let turn = 0;
  window.fetch = async () => {
    turn += 1;
    const tokens = (layer) => many(experts, (expert) => (37 * expert + 11 * layer + 5 * turn) % 101);
    const load = { seconds: 60, layers: many(layers, (layer) => (
      { layer, expert_tokens: tokens(layer), balancedness: 0.5, load_cv: 0.58, dead_experts: 1, router_entropy: 2 })) };
    const gap = { ...real.fidelity.total, tokens: 1000 * layers, layers: many(layers, (layer) => (
      { layer, l2_rel: 0.1 + 0.01 * ((layer + turn) % 9), cosine_distance: 0.01, missed_mass: 0.2, overlap: 0.8 })) };
    const facts = { ...real.facts, layers: String(layers || 4), experts: String(experts) };
    return new Response(JSON.stringify({ ...real, uptime_seconds: real.uptime_seconds + 2 * turn, facts,
      expert_load: { window: load, total: load }, fidelity: { window: gap, total: gap } }));
  };
})"""


def pretend(page, server, layers, experts, **screen):
    page.open(server.url, **screen)
    page.until("answers.length > 0")
    page.eval(f"{PRETEND}({layers}, {experts})")


def large(page, server):
    """A model of 48 layers with 128 experts each: all is seen at once, updated in place, and nothing moves by itself."""
    pretend(page, server, 48, 128)
    page.until("heat.cells.length === 48 && heat.cells[47].length === 128 && $('gap-table').rows.length === 49")
    assert page.eval("$('heat-frame').scrollWidth <= $('heat-frame').clientWidth"), "the load of all experts is side by side"
    watched = "[heat.cells[3][7], $('gap-table').rows[5].cells[1]]"
    page.eval(f"window.watched = {watched}, window.before = watched.map((e) => e.textContent)")
    page.until("watched.every((e, i) => e.textContent !== before[i])")
    assert page.eval("watched.every((e) => e.isConnected)"), "in the elements that were there"

    page.eval("$('heat-frame').focus({ preventScroll: true }), window.scrollTo(0, 0)")
    page.eval("heat.cells[46][126].dispatchEvent(new PointerEvent('pointerover', { bubbles: true }))")
    assert "Layer 46, expert 126" in page.eval("$('heat-read').textContent")
    assert page.eval("scrollY") == 0, "a pointer moves no page"
    page.key("ArrowRight")
    page.key("ArrowDown")
    assert "Layer 47, expert 127" in page.eval("$('heat-read').textContent")
    seen = page.eval("(() => { const b = heat.cells[47][127].getBoundingClientRect(); return b.top >= 0 && b.bottom <= innerHeight; })()")
    assert seen, "a key does"
    no_noise(page, server.url)

    pretend(page, server, 48, 128, width=360, height=740, scale=2, touch=True)
    page.until("heat.cells.length === 48")
    page.eval("$('heat-frame').scrollLeft = 700")
    left = "document.querySelector('#heat tbody th').getBoundingClientRect().left - $('heat-frame').getBoundingClientRect().left"
    assert page.eval("$('heat-frame').scrollLeft") > 0 and abs(page.eval(left)) < 2, "the layer of a row stays beside it"
    assert page.eval("document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways"
    no_noise(page, server.url)


TUNING = """((job, change) => {
  const real = answers.at(-1);
  window.fetch = async () => new Response(JSON.stringify({ ...real, mode: job ? "tune" : "serve", tuning: {
    job, loss: job ? [[1, 3.3], [2, 3.2], [3, 3.1]] : [], gap: job ? [[0, [0.5, 0.5, 0.2]], [3, [0.1, 0.1, 0.05]]] : [], switch: change } }));
})"""


def figures(gap, **others):
    return {"gap_nats": gap, "perplexity_ratio": 1 + gap, "dead_experts": 0, **others}


def tuning(page, server, shots):
    """Nothing of tuning is shown before there is a job or a change of weights; then its figures, its curves, and what became of it."""
    page.open(server.url)
    page.until("answers.length > 0")
    assert not page.eval("$('tuning').checkVisibility()"), "a server that has tuned nothing"
    change = {"publish": "published", "generation": 2, "seconds_ago": 5.0}
    page.eval(f"{TUNING}(null, {json.dumps(change)})")
    page.until("$('tuning').checkVisibility()")
    assert page.eval("$('tuning-switch').textContent") == "Generation 2 was published, 5 s ago."
    assert not page.eval("$('tuning-curves').checkVisibility()"), "there is no job"
    job = {"job": "t<1>", "target": "router", "estimator": "soft", "state": "running", "step": 3, "steps": 10, "eta_seconds": 70.0, "share": 0.25,
           "losses": {"total": 3.1, "lm": 3.1, "distill": None, "auxiliary": None}, "gradient_norm": 1.0, "router_gradient_norm": None,
           "before": {"serving": figures(0.5), "top1": None, "top2": figures(0.2)},
           "now": {"serving": figures(0.1), "top1": figures(0.1), "top2": figures(0.05)}}
    page.eval(f"{TUNING}({json.dumps(job)}, {json.dumps(dict(change, publish=None, rollback='gap'))})")
    page.until("document.querySelector('#own-plot .scatterlayer .js-line') && document.querySelector('#loss-plot .scatterlayer .js-line')")
    assert page.eval("$('tuning-note').textContent") == "Job t<1>: router under soft"
    for said in ("3 of 10", "70 s", "25 %", "0.5 → 0.1", "1.5 → 1.1"):
        assert said in page.eval("$('tuning-stats').textContent"), said
    assert "because the live gap had grown" in page.eval("$('tuning-switch').textContent")
    assert page.eval("document.querySelectorAll('#own-plot .scatterlayer .js-line').length") == 2, "top-1 is what is served"
    assert page.eval("$('own-top1').hidden && !$('own-top2').hidden && $('facts').textContent.includes('tuning beside them')")
    assert page.eval("$('own-plot').querySelector('svg').getBoundingClientRect().width <= $('own-plot').clientWidth + 1"), "in its card"
    names(page)
    contrast(page)
    shots.take(page, "page-tuning")
    no_noise(page, server.url)


def dense(page, server):
    """A model without experts has no cards about them, and its text is shown."""
    pretend(page, server, 0, 0)
    page.until("document.body.classList.contains('dense')")
    assert not page.eval("[...document.querySelectorAll('.moe')].some((e) => e.checkVisibility())")
    assert page.eval("document.querySelector('.no-moe').checkVisibility() && $('facts').textContent.includes('no experts')")
    for text in ("one", "two"):
        tokens = [{"id": 1, "text": text, "generated": False}, {"id": 2, "text": "more", "generated": True}]
        answer = {"routing": "native", "layers": [], "tokens": tokens, "first_token_seconds": 0.1, "decode_seconds": 0.1}
        page.eval(f"showAnswer({json.dumps(answer)})")
        assert page.eval("$('tokens').textContent.includes('more')") and text in page.eval("$('tokens').textContent"), text
        assert "no experts" in page.eval("$('details').textContent")
    names(page)
    contrast(page)
    no_noise(page, server.url)


def the_end(page, server):
    """A server that is gone is shown as gone."""
    page.open(server.url)
    page.until("$('health-text').textContent === 'serving'")
    server.close()
    page.until("$('health-text').textContent === 'connection lost'")
    assert page.eval("document.body.classList.contains('stale') && $('lost').textContent.includes('does not answer')")


def read_only(page, binary):
    server = Server(binary, ["--live-page", "read-only"])
    try:
        page.open(server.url)
        page.until("$('health-text').textContent === 'serving'")
        assert not page.eval("document.querySelector('.try').checkVisibility()")
        no_noise(page, server.url)
    finally:
        server.close()


class Shots:
    def __init__(self, folder):
        self.folder = folder
        # Of the charts, two seconds each: a picture is taken once there is something on them.
        self.points = 45 if folder else 3

    def take(self, page, name):
        if self.folder:
            time.sleep(1)
            page.screenshot(os.path.join(self.folder, f"{name}.png"))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--browser", required=True)
    parser.add_argument("--binary", required=True)
    parser.add_argument("--screenshots", metavar="DIR")
    arguments = parser.parse_args()
    shots, traffic = Shots(arguments.screenshots), []
    server = Server(arguments.binary, ["--shadow-rate", "0.3", "--shadow-budget", "0.5"])
    server.binary = arguments.binary
    page = None
    try:
        page = Browser(arguments.browser)
        desktop(page, server, traffic, shots)
        phone(page, server, shots)
        traffic.pop().stop()
        large(page, server)
        dense(page, server)
        tuning(page, server, shots)
        the_end(page, server)
        read_only(page, arguments.binary)
    finally:
        while traffic:
            traffic.pop().stop()
        try:
            if page:
                page.close()
        finally:
            server.close()
    print("the live page: loads, moves, answers and ends as it should")


if __name__ == "__main__":
    sys.exit(main())
