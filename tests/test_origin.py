"""No foreign web page, in the browser of a user who can reach this server, can use it or show its responses."""

import base64
import hashlib
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import pytest
from pydantic import ValidationError
from service import QUICK, URL, Api, ok, problem, running
from starlette.testclient import TestClient

from batchserve import keys
from batchserve.access import Scope
from batchserve.app import create_app
from batchserve.db.connect import Database
from batchserve.settings import Settings

CSV = "sepal length (cm),sepal width (cm),petal length (cm),petal width (cm)\n5.1,3.5,1.4,0.2\n"
OWN = urlsplit(URL).netloc


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, iris_onnx: Path) -> Iterator[Api]:
    """A server without keys, as a user runs it on a personal computer."""
    with running(tmp_path_factory.mktemp("origin"), worker=False) as api:
        api.register("iris", iris_onnx)
        yield api


@contextmanager
def listening(folder: Path, host: str, allowed: str = "") -> Iterator[TestClient]:
    settings = Settings(storage=str(folder), allowed_hosts=allowed, **QUICK)
    with TestClient(create_app(settings, worker=False, host=host), base_url=URL) as http:
        yield http


def status(http: TestClient, host: str, **headers: str) -> int:
    return http.get("/v1/jobs", headers={"host": host, **headers}).status_code


def attacks(api: Api) -> list[tuple[str, str, str | None]]:
    """A request of every kind that reads, creates, changes or removes something."""
    job = api.upload(CSV)["id"]
    return [
        ("GET", "/v1/jobs", None),
        ("GET", f"/v1/jobs/{job}", None),
        ("GET", f"/v1/download/{job}/input", None),
        ("GET", "/openapi.json", None),
        ("GET", "/livez", None),
        ("POST", "/v1/upload", CSV),
        ("PUT", "/v1/upload", CSV),
        ("POST", "/v1/predict?model=iris", CSV),
        ("POST", "/v1/jobs/predict?model=iris", None),
        ("POST", f"/v1/predict/{job}?model=iris", None),
        ("POST", "/v1/models/iris/predict", CSV),
        ("POST", f"/v1/jobs/{job}/cancel", None),
        ("POST", f"/v1/jobs/{job}/retry", None),
        ("DELETE", f"/v1/jobs/{job}", None),
        ("DELETE", "/v1/models/iris/versions/1", None),
        ("PATCH", f"/v1/jobs/{job}", None),
        ("OPTIONS", "/v1/jobs", None),
        ("BREW", "/v1/jobs", None),
    ]


def refused(api: Api, headers: Mapping[str, str], expected: int, code: str) -> None:
    """Each of the attacks, with these headers, gets the same problem and changes nothing."""
    tried = attacks(api)
    with api.unchanged():
        for method, path, content in tried:
            problem(api.http.request(method, path, headers=dict(headers), content=content), expected, code)


# --- hosts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example"]
)
def test_a_foreign_name_that_resolves_to_this_server_reaches_nothing(site: Api, host: str) -> None:
    refused(
        site, {"host": host, "sec-fetch-site": "same-origin", "origin": f"http://{host}"}, 421, "misdirected-request"
    )


def test_the_refusal_says_how_to_allow_the_host(site: Api) -> None:
    body = problem(site.http.get("/v1/jobs", headers={"host": "gpu-7.lan:80"}), 421, "misdirected-request")
    assert "BATCHSERVE_ALLOWED_HOSTS=gpu-7.lan" in body["detail"]


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:8000", "localhost.", "localhost.:8000", "localhost:", "127.0.0.1", "127.9.9.9:1", "[::1]",
     "[::1]:65535", "[::ffff:127.0.0.1]"],
)  # fmt: skip
def test_loopback_is_reached_by_all_its_names(site: Api, host: str) -> None:
    assert status(site.http, host) == 200


@pytest.mark.parametrize(
    "host",
    ["127.1", "0x7f.0.0.1", "2130706433", "0.0.0.1", "10.0.0.5", "[fd00::5]", "[::]", "localhost..", ".localhost",
     "evil.localhost", "localhostx", "xlocalhost", "a,b", "localhost, evil.example", "evil@localhost", "localhost@evil",
     "user:pw@localhost", "localhost/", "localhost/evil", "localhost#", "localhost?", "localhost:80:80", "localhost:x",
     "localhost:65536", "localhost:-1", "localhost:999999", "[::1", "::1", "[localhost]", "[]", "[", "", " ", ":8000",
     "http://localhost", "local%68ost", "localhost\\", "localhost\t", "lo calhost", "\xe9", "a" * 300,
     "\u217cocalhost"],
)  # fmt: skip
def test_a_host_that_only_resembles_an_allowed_one_is_refused(site: Api, host: str) -> None:
    answer = site.http.get("/v1/jobs", headers={b"host": host.encode("utf-8")})
    assert (answer.status_code, answer.json()["code"]) in ((400, "bad-request"), (421, "misdirected-request"))


@pytest.mark.parametrize("name", ["x-forwarded-host", "forwarded", "x-host", "x-original-host", "x-forwarded-server"])
def test_no_other_header_replaces_the_host(site: Api, name: str) -> None:
    assert status(site.http, "evil.example", **{name: "host=localhost" if name == "forwarded" else "localhost"}) == 421
    assert status(site.http, OWN, **{name: "evil.example"}) == 200


def test_the_settings_allow_other_hosts(tmp_path: Path) -> None:
    with listening(tmp_path, "127.0.0.1", " Batch.example.com, *.lab.example,10.0.0.5,[fd00::5] ,bulk_1") as http:
        for host in ("batch.example.com", "BATCH.example.com.:8443", "a.lab.example", "a.b.lab.example:1",
                     "10.0.0.5:8000", "[fd00::5]", "bulk_1", "localhost"):  # fmt: skip
            assert status(http, host) == 200, host
        for host in ("example.com", "x.batch.example.com", "lab.example", "xlab.example", "10.0.0.6", "evil.example"):
            assert status(http, host) == 421, host


def test_one_star_allows_every_host_and_still_no_page_of_another_origin(tmp_path: Path) -> None:
    with listening(tmp_path, "127.0.0.1", "*") as http:
        assert status(http, "any.example") == 200
        assert status(http, "any.example", origin="http://other.example") == 403
        assert status(http, "[") == 400


@pytest.mark.parametrize(
    "entry", ["http://a.example", "a.example:80", "a.example/", "*.", "a*.example", "a b", "*x", "ä.de"]
)
def test_a_setting_that_names_no_host_is_refused(entry: str) -> None:
    with pytest.raises(ValidationError, match="is not a host"):
        Settings(allowed_hosts=entry)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3"])  # noqa: S104 - nothing listens there
def test_a_server_on_a_public_address_accepts_addresses_but_no_names(tmp_path: Path, host: str) -> None:
    """A container, a forwarded port, the probe of a cluster: no DNS is involved."""
    with listening(tmp_path, host) as http:
        for address in ("10.1.2.3:8000", "192.168.1.7", "[fd00::7]:8000", "127.0.0.1", "localhost"):
            assert status(http, address) == 200, address
        for name in ("evil.example", "10.1.2.3.evil.example", "batchserve"):
            assert status(http, name) == 421, name


def test_a_server_that_listens_on_a_name_is_reached_by_it(tmp_path: Path) -> None:
    with listening(tmp_path, "Gpu-7.lan") as http:
        assert (status(http, "gpu-7.lan:8000"), status(http, "gpu-8.lan")) == (200, 421)


def test_any_number_of_hosts_is_checked_correctly(tmp_path: Path) -> None:
    with listening(tmp_path, "127.0.0.1", "*.lab.example") as http:
        for number in range(600):
            assert status(http, f"h{number}.lab.example") == 200
            assert status(http, f"h{number}.evil.example") == 421


# --- pages of other origins ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://localhost:3000"},
        {"origin": "http://127.0.0.1"},
        {"origin": "http://127.0.0.2:8000"},
        {"origin": "file://"},
        {"origin": "chrome-extension://abcdefghijklmnop"},
        {"origin": ""},
        {"origin": f"{OWN}"},
        {"origin": f"http://{OWN}/"},
        {"origin": f"http://user@{OWN}"},
        {"origin": f"http://{OWN}.evil.example"},
        {"origin": f"http://{OWN}, http://evil.example"},
        {"origin": f"http://evil.example http://{OWN}"},
        {"origin": f"ftp://{OWN}"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"sec-fetch-site": "cross-site", "origin": f"http://{OWN}"},
        {"sec-fetch-site": "same-origin", "origin": "http://evil.example"},
        {"sec-fetch-site": "none", "origin": "null"},
        {"sec-fetch-site": "sideways"},
        {"sec-fetch-site": ""},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors", "sec-fetch-dest": "script"},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "iframe"},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "embed"},
    ],
    ids=str,
)
def test_a_page_of_another_origin_can_use_nothing(site: Api, headers: dict[str, str]) -> None:
    refused(site, headers, 403, "cross-origin")


@pytest.mark.parametrize(
    "media_type",
    ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/json"],
)
def test_a_form_of_another_site_queues_nothing(site: Api, media_type: str) -> None:
    job = site.upload(CSV)["id"]
    headers = {"content-type": media_type, "origin": "https://evil.example"}
    with site.unchanged():
        for path in (f"/v1/predict/{job}", "/v1/upload", f"/v1/jobs/{job}/cancel"):
            problem(site.http.post(path, headers=headers, content='{"model": "iris"}'), 403, "cross-origin")


def test_a_link_of_another_site_may_be_followed_to_what_is_only_read(site: Api) -> None:
    followed = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
    job = site.upload(CSV)
    assert site.http.get("/docs", headers=followed).status_code == 200
    assert site.http.get(job["links"]["input"], headers=followed).status_code == 200
    with site.unchanged():
        problem(site.http.post("/v1/upload", headers=followed, content=CSV), 403, "cross-origin")


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"origin": f"http://{OWN}"},
        {"origin": f"http://{OWN}", "sec-fetch-site": "same-origin"},
        {"sec-fetch-site": "none"},
        {"host": "LocalHost:8000", "origin": "http://localhost:8000"},
        {"host": "localhost", "origin": "http://localhost"},
        {"host": "localhost:80", "origin": "http://localhost"},
        {"host": "[::1]:8000", "origin": "http://[::1]:8000"},
        {"host": "localhost", "origin": "https://localhost"},  # TLS ends at a proxy
        {"host": "localhost:8443", "origin": "https://localhost:8443"},
    ],
    ids=str,
)
def test_programs_and_pages_of_this_server_keep_working(site: Api, headers: dict[str, str]) -> None:
    job = ok(site.http.post("/v1/upload", content=CSV, headers=headers), 201)
    assert site.http.delete(job["links"]["self"], headers=headers).status_code == 204


def test_plain_http_is_another_origin_than_https(site: Api) -> None:
    https = TestClient(site.http.app, base_url="https://localhost")
    assert https.get("/v1/jobs", headers={"origin": "https://localhost"}).status_code == 200
    problem(https.post("/v1/upload", content=CSV, headers={"origin": "http://localhost"}), 403, "cross-origin")


def test_a_key_does_not_exempt_from_the_rule(tmp_path: Path) -> None:
    """The rule does not read the database, and has no exception."""
    with running(tmp_path, worker=False) as api:
        database = Database(api.settings.database_url)
        with database.write() as connection:
            _, text = keys.create(connection, "ada", Scope.ADMIN, "default", 1.0)
        database.close()
        key = {"authorization": f"Bearer {text}"}
        assert status(api.http, OWN, **key) == 200
        assert status(api.http, "evil.example", **key) == 421
        assert status(api.http, OWN, **key, origin="http://evil.example") == 403


# --- answers ---------------------------------------------------------------------------------------------------------


def test_every_response_is_restricted_to_this_origin_and_not_sniffed(site: Api) -> None:
    job = site.upload('<script>alert(1)</script>\n"<svg onload=alert(1)>"\n', filename="page.html")
    answers = [
        site.http.get("/docs"),
        site.http.get("/docs/static/swagger-ui.css"),
        site.http.get("/livez"),
        site.http.get("/nowhere"),
        site.http.get("/v1/jobs"),
        site.http.get(job["links"]["self"]),
        site.http.get(job["links"]["self"]),  # a cached response
        site.http.get(job["links"]["input"]),
        site.http.get("/v1/jobs", headers={"host": "evil.example"}),
        site.http.post("/v1/upload", headers={"origin": "null"}),
    ]
    answers += (pages := [site.http.get("/"), site.http.get(f"/jobs/{job['id']}")])
    for answer in answers:
        assert answer.headers.get_list("x-content-type-options") == ["nosniff"], answer.url
        assert answer.headers.get_list("cross-origin-resource-policy") == ["same-origin"]
        (policy,) = answer.headers.get_list("content-security-policy")
        assert "frame-ancestors 'none'" in policy
        assert answer.url.path == "/docs" or answer in pages or policy.endswith("sandbox")
        assert not any(name.startswith("access-control-") for name in answer.headers)


def test_user_data_is_sent_as_an_attachment_and_never_shown(tmp_path: Path, iris_onnx: Path) -> None:
    with running(tmp_path, chunk_records=100) as api:
        api.register("iris", iris_onnx)
        job = api.run(CSV + "<script>,,,\n", "iris")
        for path in (job["links"]["input"], job["links"]["result"], f"{job['links']['result']}?format=parquet",
                     job["links"]["errors"]):  # fmt: skip
            assert api.http.get(path).headers["content-disposition"].startswith("attachment;"), path
        listed = api.http.get(job["links"]["errors"], headers={"accept": "text/csv"})
        assert listed.headers["content-disposition"].endswith('-errors.csv"')


def test_the_page_of_the_documentation_runs_only_its_own_scripts(site: Api) -> None:
    page = site.http.get("/docs")
    policy = page.headers["content-security-policy"]
    (script,) = re.findall(r"<script>(.*?)</script>", page.text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'self' 'sha256-{digest}';" in policy
    assert "unsafe-eval" not in policy
    for source in re.findall(r'(?:src|href)="([^"]+)"', page.text):
        assert site.http.get(source).status_code == 200
        assert source.startswith("/docs/static/")


def test_no_response_repeats_a_host(tmp_path: Path) -> None:
    """Not even an allowed one: a redirect is followed with everything that was sent."""
    with listening(tmp_path, "127.0.0.1", "*") as http:
        job = ok(http.post("/v1/upload", content=CSV), 201)["id"]
        paths = ["/", "/docs", "/docs/", "/docs/static", "/openapi.json", "/v1/jobs", "/v1/jobs/", f"/v1/jobs/{job}",
                 f"/v1/jobs/{job}/", "/v1/models/", "//evil.example/", "/v1//jobs", "/v1/upload/"]  # fmt: skip
        for path in paths:
            for method in ("GET", "POST"):
                request = http.build_request(method, URL, headers={"host": "evil.example"}, content=CSV)
                request.url = httpx2.URL(URL + path)
                answer = http.send(request, follow_redirects=False)
                assert "evil.example" not in answer.text.replace("//evil.example/", "")
                assert "evil.example" not in str(answer.headers)
                assert not answer.headers.get("location", "/").startswith("//")


# --- the wire --------------------------------------------------------------------------------------------------------


def exchange(url: str, *lines: str) -> tuple[int, bytes]:
    """Status and bytes of the answer to a request of these lines."""
    host, port = urlsplit(url).hostname, urlsplit(url).port
    with socket.create_connection((host, port), timeout=10) as connection:
        close = () if any("Upgrade" in line for line in lines) else ("Connection: close",)
        connection.sendall("".join(f"{line}\r\n" for line in (*lines, *close, "")).encode())
        answer = b""
        while block := connection.recv(65536):
            answer += block
    return int(answer.split(b" ", 2)[1]), answer


Serving = Callable[..., AbstractContextManager[str]]


@pytest.mark.slow
def test_a_real_server_keeps_browsers_to_its_own_pages(server: str) -> None:
    own = f"Host: {urlsplit(server).netloc}"
    expected = {
        ("GET /v1/jobs HTTP/1.1", own): 200,
        ("GET /v1/jobs HTTP/1.1", "Host: evil.example"): 421,
        ("GET /v1/jobs HTTP/1.1",): 400,
        ("GET /v1/jobs HTTP/1.0",): 200,  # no browser
        ("GET /v1/jobs HTTP/1.0", "Host: evil.example"): 421,
        ("GET /v1/jobs HTTP/1.1", own, "Host: evil.example"): 400,
        ("GET /v1/jobs HTTP/1.1", "Host: evil.example", own): 400,
        ("GET /v1/jobs HTTP/1.1", own, own): 400,
        ("GET /v1/jobs HTTP/1.1", "Host: ["): 400,
        ("GET http://evil.example/v1/jobs HTTP/1.1", "Host: evil.example"): 421,
        ("GET http://evil.example/v1/jobs HTTP/1.1", own): 421,
        (f"GET {server}/v1/jobs HTTP/1.1", "Host: evil.example"): 200,
        ("OPTIONS * HTTP/1.1", own): 404,
        ("CONNECT evil.example:80 HTTP/1.1", own): 400,
        ("POST /v1/upload HTTP/1.1", own, "Origin: http://evil.example", "Content-Length: 0"): 403,
        ("POST /v1/upload HTTP/1.1", own, f"Origin: {server}", "Origin: null", "Content-Length: 0"): 400,
        ("POST /v1/upload HTTP/1.1", own, "Sec-Fetch-Site: same-origin", "Sec-Fetch-Site: cross-site"): 400,
        ("OPTIONS /v1/jobs HTTP/1.1", own, "Origin: http://evil.example", "Access-Control-Request-Method: PUT"): 403,
    }  # fmt: skip
    found = {lines: exchange(server, *lines)[0] for lines in expected}
    assert found == expected


def test_an_upgrade_to_a_websocket_is_ignored_and_its_origin_checked(server: str) -> None:
    upgrade = ("Connection: Upgrade, close", "Upgrade: websocket", "Sec-WebSocket-Version: 13")
    key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="
    own = ("GET /v1/jobs HTTP/1.1", f"Host: {urlsplit(server).netloc}", *upgrade, key)
    status, answer = exchange(server, *own)
    assert status == 200, answer  # and no 101
    status, answer = exchange(server, *own, "Origin: http://evil.example")
    assert status == 403, answer


@pytest.mark.slow
def test_serve_takes_its_hosts_from_address_and_settings(start_server: Serving, tmp_path: Path) -> None:
    arguments = ("--host", "0.0.0.0", "--insecure")  # noqa: S104 - without data, for a moment
    with start_server(tmp_path, *arguments, BATCHSERVE_ALLOWED_HOSTS="batchserve") as url:
        url = url.replace("0.0.0.0", "127.0.0.1")  # noqa: S104
        found = [exchange(url, "GET /v1/jobs HTTP/1.1", f"Host: {host}")[0] for host in
                 ("batchserve:8000", "172.17.0.2:8000", "localhost", "evil.example")]  # fmt: skip
    assert found == [200, 200, 200, 421]
