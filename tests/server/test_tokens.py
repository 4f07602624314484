"""Tenants by tokens of issuers, whose keys a local HTTP server or a file gives."""

import asyncio
import base64
import hashlib
import hmac
import http.server
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.harness.tenants import tenant, write_tenants
from mtlora.client import Access, AsyncClient, ServerError
from server.errors import RequestFailedError
from server.tenants import Directory, TenantsError, read_tenants
from server.tenants.authentication import Authenticator
from server.tenants.config import Issuer
from server.tenants.jwks import JWKSError, read_jwks, read_keys_of
from tests.server.fakes import Service
from tests.waiting import eventually

ISSUER = "https://login.example.com/"
# Strategies for an issuer's configuration: any JSON value, and objects with the right members.
_SCALARS = st.none() | st.booleans() | st.integers() | st.text(max_size=8)
CONFIGURATIONS = st.fixed_dictionaries({}, optional={"issuer": _SCALARS | st.just(ISSUER), "jwks_uri": _SCALARS})


class Key:
    """A private key, and the JWK of its public one."""

    def __init__(self, algorithm: str, key_id: str | None) -> None:
        self.algorithm, self.key_id = algorithm, key_id
        kind: Any = {"RS": jwt.algorithms.RSAAlgorithm, "ES": jwt.algorithms.ECAlgorithm}.get(
            algorithm[:2], jwt.algorithms.OKPAlgorithm
        )
        self.private: Any = {
            "RS256": lambda: rsa.generate_private_key(65537, 2048),
            "ES256": lambda: ec.generate_private_key(ec.SECP256R1()),
            "ES384": lambda: ec.generate_private_key(ec.SECP384R1()),
            "EdDSA": ed25519.Ed25519PrivateKey.generate,
        }[algorithm]()
        self.jwk: dict[str, Any] = kind.to_jwk(self.private.public_key(), as_dict=True)
        self.jwk |= {"kid": key_id} if key_id else {}

    def token(self, *, headers: dict[str, Any] | None = None, algorithm: str = "", **claims: Any) -> str:
        """A good token of tenant a, but for what is given; None leaves a claim out."""
        now = int(time.time())
        claims = {"iss": ISSUER, "aud": "mtlora", "sub": "a", "iat": now, "exp": now + 600} | claims
        named = {"kid": self.key_id} if self.key_id else {}
        return jwt.encode(
            {name: value for name, value in claims.items() if value is not None},
            self.private, algorithm or self.algorithm, {**named, **(headers or {})},
        )  # fmt: skip

    @property
    def pem(self) -> bytes:
        form = serialization.PublicFormat.SubjectPublicKeyInfo
        return bytes(self.private.public_key().public_bytes(serialization.Encoding.PEM, form))


class KeyServer:
    """Serves `content` as JWKS, counts the requests, and lets them wait while `hang` is set."""

    def __init__(self, *keys: Key) -> None:
        self.serve(*keys)
        self.paths: list[str] = []
        self.status, self.headers = 200, dict[str, str]()
        self.hang = threading.Event()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.paths.append(self.path)
                while outer.hang.is_set():
                    time.sleep(0.02)
                try:
                    self.send_response(outer.status)
                    for name, value in outer.headers.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(outer.content)
                except OSError:
                    pass

            def log_message(self, *_: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/jwks.json"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def serve(self, *keys: Key) -> None:
        self.content = json.dumps({"keys": [key.jwk for key in keys]}).encode()

    def close(self) -> None:
        self.hang.clear()
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="module")
def rsa_key() -> Key:
    return Key("RS256", "one")


@pytest.fixture
def key_server(rsa_key: Key) -> Iterator[KeyServer]:
    server = KeyServer(rsa_key)
    yield server
    server.close()


def write(folder: Path, jwks: str, **issuer: Any) -> Path:
    """Tenants a and b by tokens, c by a key alone."""
    entries = [{"id": name, "token_issuers": [ISSUER]} for name in ("a", "b")]
    _, c = tenant("c", admin=True)
    issuers = [{"issuer": ISSUER, "audience": "mtlora", "jwks": jwks, **issuer}]
    return write_tenants(folder / "tenants.yaml", *entries, c, issuers=issuers)


def authenticator(folder: Path, jwks: str, **issuer: Any) -> Authenticator:
    return Authenticator(Directory(write(folder, jwks, **issuer)))


async def ask(who: Authenticator, token: str) -> str:
    return (await who.tenant([("authorization", f"Bearer {token}")], dict)).id


async def refusal(who: Authenticator, token: str) -> RequestFailedError:
    with pytest.raises(RequestFailedError) as raised:
        await ask(who, token)
    return raised.value


@asynccontextmanager
async def refreshing(who: Authenticator) -> AsyncIterator[None]:
    task = asyncio.create_task(who.tokens.run())
    try:
        yield
    finally:
        task.cancel()


@pytest.mark.parametrize("algorithm", ["RS256", "ES256", "EdDSA"])
async def test_a_signed_token_is_a_tenant(tmp_path: Path, algorithm: str) -> None:
    key = Key(algorithm, "k")
    (tmp_path / "jwks.json").write_text(json.dumps({"keys": [key.jwk]}))
    service = Service(tenants=write(tmp_path, "jwks.json"))
    async with service.running():
        async with AsyncClient(service.address, Access(key.token(sub="b"))) as client:
            assert (await client.generate("one", "x")).text == "ab"
        async with AsyncClient(service.address, Access(key.token(aud="other"))) as client:
            with pytest.raises(ServerError, match="UNAUTHENTICATED: the token is not accepted: Audience"):
                await client.generate("one", "x")
    assert service.value("mtlora_tenant_requests_total", tenant="b", status="OK") == 1


def unsigned(**claims: Any) -> str:
    return jwt.encode({"iss": ISSUER, "aud": "mtlora", "sub": "a", "exp": time.time() + 60} | claims, None, "none")


def hmac_with(secret: bytes, key_id: str) -> str:
    """PyJWT refuses to make this forgery: HS256 with the public key as the secret."""
    parts = (
        {"alg": "HS256", "typ": "JWT", "kid": key_id},
        {"iss": ISSUER, "aud": "mtlora", "sub": "a", "exp": int(time.time()) + 60},
    )
    encoded = b".".join(base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=") for part in parts)
    signature = base64.urlsafe_b64encode(hmac.digest(secret, encoded, hashlib.sha256)).rstrip(b"=")
    return b".".join((encoded, signature)).decode()


def forgeries(key: Key) -> dict[str, str]:
    now = time.time()
    good = key.token()
    head, body, signature = good.split(".")
    other = key.token(sub="b").split(".")
    return {
        "alg none": unsigned(),
        "alg none, with the signature's place": unsigned() + signature,
        "HS256 with the public key": hmac_with(key.pem, "one"),
        "HS256 with the JWK": hmac_with(json.dumps(key.jwk).encode(), "one"),
        "another's key": Key("RS256", "one").token(),
        "an algorithm that is not allowed": key.token(algorithm="PS256"),
        "another kind of key": Key("ES256", "one").token(),
        "another's claims": f"{head}.{other[1]}.{signature}",
        "no signature": f"{head}.{body}.",
        "wrong issuer": key.token(iss="https://evil.example.com/"),
        "issuer with a suffix": key.token(iss=ISSUER + "/"),
        "issuer that is a list": key.token(iss=None, **{"iss ": [ISSUER]}),
        "no issuer": key.token(iss=None),
        "wrong audience": key.token(aud="other"),
        "no audience": key.token(aud=None),
        "expired": key.token(exp=now - 31),
        "no expiry": key.token(exp=None),
        "future": key.token(nbf=now + 60),
        "issued in the future": key.token(iat=now + 60),
        "unknown key": key.token(headers={"kid": "two"}),
        "key as a path": key.token(headers={"kid": "../../../../dev/null"}),
        "key as a URL": key.token(headers={"kid": "http://127.0.0.1:1/", "jku": "http://127.0.0.1:1/"}),
        "no tenant": key.token(sub=None),
        "unknown tenant": key.token(sub="nobody"),
        "a tenant without token_issuers": key.token(sub="c"),
        "three words": "a.b.c",
        "dots": "..",
    }


async def test_forged_tokens_are_unauthenticated(tmp_path: Path, rsa_key: Key, key_server: KeyServer) -> None:
    who = authenticator(tmp_path, key_server.url)
    assert await ask(who, rsa_key.token()) == "a"
    for name, token in forgeries(rsa_key).items():
        assert (await refusal(who, token)).code is grpc.StatusCode.UNAUTHENTICATED, name
    # Within the leeway for clocks.
    assert await ask(who, rsa_key.token(exp=time.time() - 5, nbf=time.time() + 5)) == "a"
    # Tokens with unknown key ids share one fetch.
    assert len(key_server.paths) == 1


def _part(text: str) -> str:
    return base64.urlsafe_b64encode(text.encode()).rstrip(b"=").decode()


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=8) | st.integers(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
)


@given(
    st.tuples(
        st.fixed_dictionaries({}, optional={"alg": JSON, "kid": JSON, "crit": JSON, "b64": JSON, "typ": JSON}),
        st.fixed_dictionaries({}, optional={"iss": st.just(ISSUER) | JSON, "aud": JSON, "exp": JSON, "nbf": JSON}),
    ).map(lambda parts: ".".join(_part(json.dumps(part)) for part in parts) + ".x")
    | st.text(max_size=60).map(lambda text: text + ".")
    | st.just(f"{_part('[' * 5000)}.{_part('[' * 5000)}.x")
)
def test_any_token_is_refused_with_a_status(tmp_path_factory: pytest.TempPathFactory, token: str) -> None:
    async def attempt() -> None:
        who = authenticator(tmp_path_factory.getbasetemp(), "https://127.0.0.1:1/jwks.json")
        # No refresh: the status of a token with a known issuer is UNAVAILABLE.
        who.tokens._source(who._directory.current.issuers[ISSUER])._may_ask = float("inf")
        codes = {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNAVAILABLE}
        assert (await refusal(who, token)).code in codes

    asyncio.run(attempt())


async def test_claims_that_no_number_holds_are_refused(tmp_path: Path, rsa_key: Key, key_server: KeyServer) -> None:
    who = authenticator(tmp_path, key_server.url)
    for value in (float("inf"), float("nan"), [], {}, "soon", -1, True, 10**400):
        assert (await refusal(who, rsa_key.token(exp=value))).code is grpc.StatusCode.UNAUTHENTICATED
    assert (await refusal(who, rsa_key.token(sub=["a"]))).code is grpc.StatusCode.UNAUTHENTICATED


async def test_a_token_is_verified_once_and_not_remembered_beyond_its_expiry(
    tmp_path: Path, rsa_key: Key, key_server: KeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    verified = list[str]()
    decode = jwt.decode

    def counting(token: str, *rest: Any, **named: Any) -> Any:
        verified.append(token)
        return decode(token, *rest, **named)

    monkeypatch.setattr(jwt, "decode", counting)
    who = authenticator(tmp_path, key_server.url)
    end = int(time.time()) + 600
    token = rsa_key.token(exp=end)
    for _ in range(3):
        assert await ask(who, token) == "a"
    assert verified == [token]
    monkeypatch.setattr("server.tenants.tokens.time.time", lambda: end)
    await ask(who, token)
    assert verified == [token, token]


async def test_rotated_keys_are_picked_up_and_withdrawn_ones_refused(
    tmp_path: Path, rsa_key: Key, key_server: KeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.tenants.tokens._UNKNOWN_KEY_S", 0.0)
    who = authenticator(tmp_path, key_server.url)
    old, new = rsa_key, Key("ES256", "two")
    before = old.token()
    assert await ask(who, before) == "a"
    key_server.serve(old, new)
    assert [await ask(who, token) for token in (new.token(sub="b"), before)] == ["b", "a"]
    key_server.serve(new)
    third = Key("ES256", "three")
    assert (await refusal(who, third.token())).code is grpc.StatusCode.UNAUTHENTICATED
    # The token was verified by a key that no longer exists.
    assert (await refusal(who, before)).code is grpc.StatusCode.UNAUTHENTICATED


async def test_keys_are_refreshed_in_the_background(
    tmp_path: Path, rsa_key: Key, key_server: KeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.tenants.tokens._TICK_S", 0.01)
    monkeypatch.setattr("server.tenants.tokens._REFRESH_S", 0.05)
    who = authenticator(tmp_path, key_server.url)
    async with refreshing(who):
        await eventually(lambda: len(key_server.paths) >= 2, 30)
        assert await ask(who, rsa_key.token()) == "a"


async def test_a_changed_file_of_keys_is_read_again(
    tmp_path: Path, rsa_key: Key, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.tenants.tokens._TICK_S", 0.01)
    path, other = tmp_path / "jwks.json", Key("EdDSA", "one")
    path.write_text(json.dumps({"keys": [rsa_key.jwk]}))
    who = authenticator(tmp_path, "jwks.json")
    async with refreshing(who):
        token = rsa_key.token()
        assert await ask(who, token) == "a"
        path.write_text(json.dumps({"keys": [other.jwk]}))
        source = who.tokens._source(who._directory.current.issuers[ISSUER])
        await eventually(lambda: source.keys["one"].algorithms == {"EdDSA"}, 30)
        assert (await refusal(who, token)).code is grpc.StatusCode.UNAUTHENTICATED
        assert await ask(who, other.token()) == "a"


async def test_a_server_of_keys_that_lies_or_fails_changes_nothing(
    tmp_path: Path, rsa_key: Key, key_server: KeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.tenants.tokens._UNKNOWN_KEY_S", 0.0)
    failures = list[str]()
    who = Authenticator(Directory(write(tmp_path, key_server.url)), failures.append)
    token, stranger = rsa_key.token(), Key("ES256", "two").token()
    assert await ask(who, token) == "a"
    lies = [b"", b"[]", b'{"keys": []}', b'{"keys": 7}', b"\xff", b"[" * 100_000, b" " * (1 << 20)]
    for content in lies:
        key_server.content = content
        assert (await refusal(who, stranger)).code is grpc.StatusCode.UNAUTHENTICATED
    key_server.serve(rsa_key)
    for status, headers in ((500, {}), (302, {"Location": key_server.url})):
        key_server.status, key_server.headers = status, headers
        assert (await refusal(who, stranger)).code is grpc.StatusCode.UNAUTHENTICATED
    assert failures == [ISSUER] * (len(lies) + 2)
    assert await ask(who, token) == "a"


def configuration(key_server: KeyServer, key: Key, **said: Any) -> dict[str, Any]:
    """An issuer's configuration and keys in one document, because the test server returns the same for every path."""
    issuer = key_server.url.removesuffix("/jwks.json")
    return {"issuer": issuer, "jwks_uri": key_server.url, "keys": [key.jwk], **said}


def serve_discovery(folder: Path, key_server: KeyServer, found: dict[str, Any]) -> tuple[Path, str]:
    """A tenants file without `jwks`, and its issuer."""
    key_server.content = json.dumps(found).encode()
    issuer = key_server.url.removesuffix("/jwks.json")
    path = folder / "tenants.yaml"
    return write_tenants(
        path, {"id": "a", "token_issuers": [issuer]}, issuers=[{"issuer": issuer, "audience": "mtlora"}]
    ), issuer


async def test_an_issuer_says_where_its_keys_are(tmp_path: Path, rsa_key: Key, key_server: KeyServer) -> None:
    path, issuer = serve_discovery(tmp_path, key_server, configuration(key_server, rsa_key))
    who = Authenticator(Directory(path))
    assert await ask(who, rsa_key.token(iss=issuer)) == "a"
    assert key_server.paths == ["/.well-known/openid-configuration", "/jwks.json"]


@pytest.mark.parametrize(
    "said",
    [
        {"issuer": ISSUER},
        {"issuer": None},
        {"jwks_uri": None},
        {"jwks_uri": 7},
        {"jwks_uri": "http://login.example.com/jwks.json"},
        {"jwks_uri": "file:///etc/passwd"},
        {"jwks_uri": "jwks.json"},
        {"jwks_uri": "http://"},
        {"jwks_uri": "http://["},
    ],
)
async def test_what_an_issuer_says_of_itself_is_checked(
    tmp_path: Path, rsa_key: Key, key_server: KeyServer, said: dict[str, Any]
) -> None:
    path, issuer = serve_discovery(tmp_path, key_server, configuration(key_server, rsa_key, **said))
    failures = list[str]()
    who = Authenticator(Directory(path), failures.append)
    assert (await refusal(who, rsa_key.token(iss=issuer))).code is grpc.StatusCode.UNAVAILABLE
    assert failures == [issuer]
    assert key_server.paths == ["/.well-known/openid-configuration"]


def test_an_issuer_elsewhere_names_no_address_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    found = json.dumps({"issuer": ISSUER, "jwks_uri": "http://127.0.0.1:9/jwks.json"}).encode()
    monkeypatch.setattr("server.tenants.jwks._fetch", lambda url: found)
    with pytest.raises(JWKSError, match=r"found jwks_uri 'http://127.0.0.1:9/jwks\.json'; allowed: an https"):
        list(read_keys_of(Issuer(issuer=ISSUER, audience="mtlora")))


@given(content=st.binary(max_size=64) | (JSON | CONFIGURATIONS).map(lambda found: json.dumps(found).encode()))
def test_any_configuration_of_an_issuer_is_refused_by_name(content: bytes) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("server.tenants.jwks._fetch", lambda url: content)
        with pytest.raises(JWKSError, match=r"openid-configuration: "):
            list(read_keys_of(Issuer(issuer=ISSUER, audience="mtlora")))


@pytest.mark.slow
async def test_a_server_of_keys_that_hangs_holds_up_nobody_else(
    tmp_path: Path, rsa_key: Key, key_server: KeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.tenants.tokens._FETCH_S", 2.0)
    monkeypatch.setattr("server.tenants.tokens._MAX_WAITING", 3)
    hanging = KeyServer(rsa_key)
    hanging.hang.set()
    key, c = tenant("c")
    other = "https://other.example.com/"
    entries = [{"id": "a", "token_issuers": [ISSUER]}, {"id": "b", "token_issuers": [other]}, c]
    issuers = [{"issuer": ISSUER, "audience": "mtlora", "jwks": hanging.url}]
    issuers += [{"issuer": other, "audience": "mtlora", "jwks": key_server.url}]
    who = Authenticator(Directory(write_tenants(tmp_path / "tenants.yaml", *entries, issuers=issuers)))
    try:
        waiting = [asyncio.create_task(refusal(who, rsa_key.token(jti=str(number)))) for number in range(3)]
        await eventually(lambda: len(hanging.paths) == 1, 30)
        # Beyond those that may wait.
        assert (await refusal(who, rsa_key.token())).code is grpc.StatusCode.UNAVAILABLE
        assert await ask(who, rsa_key.token(iss=other, sub="b")) == "b"
        assert await ask(who, key) == "c"
        assert {error.code for error in await asyncio.gather(*waiting)} == {grpc.StatusCode.UNAVAILABLE}
    finally:
        hanging.close()


def test_unusable_keys_are_left_out(tmp_path: Path, rsa_key: Key) -> None:
    path = tmp_path / "jwks.json"
    small = jwt.algorithms.RSAAlgorithm.to_jwk(rsa.generate_private_key(65537, 1024).public_key(), as_dict=True)
    huge = {**rsa_key.jwk, "e": _part("x" * 200)}
    private = jwt.algorithms.ECAlgorithm.to_jwk(Key("ES256", None).private, as_dict=True)
    wrong: list[Any] = [
        {"kty": "oct", "k": "c2VjcmV0", "kid": "symmetric"}, {**rsa_key.jwk, "use": "enc"},
        {**rsa_key.jwk, "alg": "HS256"}, {**rsa_key.jwk, "alg": "none"}, {**rsa_key.jwk, "kid": 7},
        {"kty": "RSA"}, {"kty": []}, small, huge, 7, None,
    ]  # fmt: skip
    path.write_text(json.dumps({"keys": wrong}))
    with pytest.raises(JWKSError, match="no usable key"):
        list(read_jwks(str(path)))
    path.write_text(json.dumps({"keys": [*wrong, private]}))
    ((found,),) = read_jwks(str(path))
    assert "d" not in found
    assert found["algorithms"] == ["ES256"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"algorithms": ["HS256"]}, "issuers.0.algorithms.0"),
        ({"algorithms": ["none"]}, "issuers.0.algorithms.0"),
        ({"algorithms": []}, "issuers.0.algorithms"),
        ({"jwks": "http://login.example.com/jwks.json"}, "issuers.0.jwks: allowed: an https:// URL"),
        ({"jwks": "ftp://127.0.0.1/jwks.json"}, "issuers.0.jwks: allowed: an https:// URL"),
        (
            {"jwks": None, "issuer": "http://login.example.com/"},
            "issuers.0: jwks: found none; allowed: a URL",
        ),
        ({"jwks": None, "issuer": "login"}, "or an issuer that is an https:// URL, not 'login'"),
        ({"audience": ""}, "issuers.0.audience"),
        ({"issuer": "https://other.example.com/"}, "token_issuers of tenant a: found 'https://login"),
        ({"leeway_s": 301}, "issuers.0.leeway_s"),
    ],
)
def test_bad_issuers_name_the_field(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(TenantsError, match=message):
        read_tenants(write(tmp_path, **{"jwks": "https://login.example.com/jwks.json", **fields}))
