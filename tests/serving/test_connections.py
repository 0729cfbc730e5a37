"""Bad clients on real sockets: none of them holds anybody else up, none stays for ever. And TLS."""

import json
import socket
import ssl
import subprocess
import threading
import time
from pathlib import Path

import httpx
import pytest
from gptoss_launch.launch.api.protocol import HEAD_LIMIT_BYTES
from gptoss_launch.launch.listen import STALLED_S, bind, tls_files
from scripted import Application, Paced, Scripted, listening

ANSWER = "<|channel|>final<|message|>Hello, world<|return|>"
LONG = "<|channel|>final<|message|>" + "on and on " * 2000
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "stream": True}


def post(**fields: object) -> bytes:
    body = json.dumps(BODY | fields).encode()
    return b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


def read_all(connection: socket.socket) -> bytes:
    """Until the other side ends it."""
    data = b""
    connection.settimeout(30)
    try:
        while part := connection.recv(1 << 16):
            data += part
    except ConnectionResetError:
        pass
    return data


def wait_for(found, limit_s: float = 20.0) -> None:
    deadline_s = time.monotonic() + limit_s
    while not found():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


@pytest.fixture(scope="module")
def server(tokenizer, markup):
    """(port, engine): answers at once, and waits a second for headers, two for bodies."""
    engine = Scripted(markup(ANSWER))
    with listening(Application(engine, tokenizer), head_s=1.0, message_s=2.0) as port:
        yield port, engine


def still_answers(port: int) -> None:
    answer = httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=BODY | {"stream": False}, timeout=30)
    assert answer.json()["choices"][0]["message"]["content"] == "Hello, world"


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\nX: " + b"a" * (HEAD_LIMIT_BYTES + 1) + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: a\r\n" * HEAD_LIMIT_BYTES + b"\r\n",
        b"GET / HTTP/1.1\r\nX: " + b"a" * (4 * HEAD_LIMIT_BYTES),  # no end to it
        b"GET /" + b"a" * (4 * HEAD_LIMIT_BYTES),
        post()[:-1] + b"\r\n\r\n" + b"\x00" * 50,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS where there is none
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1;" + b"a" * (1 << 20),
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
    ],
    ids=range(9),
)
def test_what_is_no_request_ends_with_400(server, sent):
    port, engine = server
    with socket.create_connection(("127.0.0.1", port)) as connection:
        try:
            connection.sendall(sent)
        except ConnectionError:
            pass  # it had seen enough
        answer = read_all(connection)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 400"), answer[:200]
    still_answers(port)


@pytest.mark.slow
@pytest.mark.parametrize("sent", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: x\r\n", post()[:-5]])
def test_a_request_that_never_comes_whole_ends_the_connection(server, sent):
    port, engine = server
    asked = len(engine.asked)
    begun_s = time.monotonic()
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(sent)
        read_all(connection)
    assert 0.9 < time.monotonic() - begun_s and len(engine.asked) == asked


@pytest.mark.slow
def test_an_answer_may_take_longer_than_its_request_may(tokenizer, markup):
    with listening(Application(Paced(markup(ANSWER), 0.1), tokenizer), head_s=0.3, message_s=0.3) as port:
        still_answers(port)


@pytest.mark.slow
def test_half_closed_reset_and_silent_clients_hold_nobody_up(tokenizer, markup):
    engine = Paced(markup(LONG), 0.0)
    with listening(Application(engine, tokenizer)) as port:
        silent = []
        for number in range(12):
            # A small window, so that what the kernel takes for a client that does not read is soon full.
            connection = socket.socket()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", port))
            connection.sendall(post(max_tokens=1500, seed=number))
            silent.append(connection)
        for connection in silent[:4]:
            connection.shutdown(socket.SHUT_WR)  # says that it sends no more: it is gone, for HTTP/1.1 servers
        for connection in silent[4:8]:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            connection.close()  # with a reset
        wait_for(lambda: len(engine.asked) >= 4)
        begun_s = time.monotonic()
        body = BODY | {"stream": False, "max_tokens": 20}
        for _ in range(5):
            answer = httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body, timeout=30)
            assert answer.json()["usage"]["completion_tokens"] == 20
        assert time.monotonic() - begun_s < 10
        for connection in (*silent[:4], *silent[8:]):
            connection.close()
        wait_for(lambda: engine.running == 0)  # nothing goes on for those that left


def test_a_client_that_leaves_ends_the_first_of_the_requests_it_sent_together(tokenizer, markup):
    """uvicorn itself tells the last one alone."""
    engine = Paced(markup(LONG), 0.005)
    with listening(Application(engine, tokenizer)) as port:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(2 * post(max_tokens=1500))
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")
            assert engine.running == 1
        wait_for(lambda: engine.running == 0, 3)  # 7.5 s at least, were it answered to its end
        assert len(engine.asked) == 1


@pytest.mark.parametrize("path", ["chat/completions", "responses"])
def test_a_client_that_leaves_while_its_schema_is_looked_at_asks_nothing(tokenizer, markup, monkeypatch, path):
    begun, let_go, statuses = threading.Event(), threading.Event(), []

    def slow(grammar):
        begun.set()
        let_go.wait(30)

    monkeypatch.setattr("gptoss_launch.launch.api.constraint.flaw_of", slow)
    schema = {"name": "a", "schema": {"type": "object"}}
    chat = BODY | {"response_format": {"type": "json_schema", "json_schema": schema}}
    response = {"model": "tiny", "input": "x", "text": {"format": {"type": "json_schema", **schema}}}
    body = json.dumps(response if path == "responses" else chat).encode()
    engine = Scripted(markup(ANSWER))
    application = Application(engine, tokenizer, count=lambda route, method, status: statuses.append(status))
    with listening(application) as port:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(b"POST /v1/%s HTTP/1.1\r\nHost: x\r\n" % path.encode())
            connection.sendall(b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
            assert begun.wait(10)
        try:
            wait_for(lambda: statuses == [499], 5)
        finally:
            let_go.set()
        still_answers(port)
        assert len(engine.asked) == 1


@pytest.mark.slow
def test_a_client_that_reads_nothing_ends_by_the_kernel():
    """Its zero window would otherwise keep what was sent, and the connection, for ever (tcp(7), TCP_USER_TIMEOUT)."""
    listener = bind("127.0.0.1", 0)
    option = socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT
    with listener, socket.create_connection(listener.getsockname()) as client:
        server, _ = listener.accept()
        with server:
            assert server.getsockopt(*option) == STALLED_S * 1000
            assert server.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            server.setsockopt(*option, 500)
            server.setblocking(False)

            def ended() -> bool:
                try:
                    server.send(b"x" * (1 << 20))
                except BlockingIOError:
                    return False
                except TimeoutError:
                    return True
                return False

            wait_for(ended)
            assert client.fileno() >= 0


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost", "-keyout", "key.pem", "-out", "cert.pem"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    command = ["openssl", "rsa", "-aes256", "-passout", "pass:word", "-in", "key.pem", "-out", "locked.pem"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder / "cert.pem", folder / "key.pem"


@pytest.mark.slow
def test_tls(tokenizer, markup, certificate):
    cert, key = certificate
    assert tls_files(cert, key) == (cert, key) and tls_files(None, None) is None
    settings = {"ssl_certfile": cert, "ssl_keyfile": key}
    with listening(Application(Scripted(markup(ANSWER)), tokenizer), **settings) as port:
        trusting = ssl.create_default_context(cafile=str(cert))
        with httpx.Client(base_url=f"https://localhost:{port}", verify=trusting) as client:
            events = client.post("/v1/chat/completions", json=BODY).text.split("\n\n")
            assert events[-2] == "data: [DONE]"
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"https://localhost:{port}/health")  # nobody we know has signed it
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"http://localhost:{port}/health")


@pytest.mark.slow
def test_a_key_that_needs_a_password_is_refused_and_asks_nobody(certificate):
    from gptoss_launch.parallel.errors import UserError

    with pytest.raises(UserError, match="encrypted"):
        tls_files(certificate[0], certificate[0].with_name("locked.pem"))
    with pytest.raises(UserError, match="--tls-key"):
        tls_files(certificate[0], certificate[0])
