"""``qvl serve`` with OpenAI's client: answers, streams, many at once, and what is refused."""

import asyncio
import base64
import http.client
import http.server
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import openai
import pytest
import uvicorn
from PIL import Image

from qvl_model import digits
from qvl_model.cli import answers, models
from qvl_model.digits import scenes
from qvl_model.serving import Engine, Limits, build_app, images

QUESTION = "Read the digits from left to right."


def _url(image):
    stream = io.BytesIO()
    image.save(stream, "png")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


SAMPLE = _url(Image.open(digits.SAMPLE).convert("RGB"))


def _messages(text=QUESTION, url=SAMPLE):
    shown = [{"type": "image_url", "image_url": {"url": url}}] if url else []
    return [{"role": "user", "content": [*shown, {"type": "text", "text": text}]}]


@contextmanager
def _running(app):
    """The port of an app in a thread."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def loaded():
    return models.load("digits")


LIMITS = Limits(max_body=1 << 20, max_pixels=10**6, max_images=2, max_tokens=64)


@pytest.fixture(scope="module")
def served(loaded):
    """(port, engine)"""
    serving = Engine(loaded, max_waiting=20, max_rows=4)
    with _running(build_app(serving, "digits", LIMITS)) as port:
        yield port, serving


@pytest.fixture
def client(served):
    with openai.OpenAI(base_url=f"http://127.0.0.1:{served[0]}/v1", api_key="none", max_retries=0) as found:
        yield found


def test_an_answer(client, loaded):
    found = client.chat.completions.create(model="digits", messages=_messages(), temperature=0)
    assert found.choices[0].message.content == "8 6 9" and found.choices[0].finish_reason == "stop"
    conversation = answers.Conversation.of(QUESTION, [Image.open(digits.SAMPLE).convert("RGB")])
    expected, _ = answers.answer(
        loaded, answers.inputs_of(loaded, [conversation]), {"max_new_tokens": 64, "do_sample": False}, lambda text: None
    )
    assert found.usage.prompt_tokens == expected.prompt_tokens
    assert found.usage.completion_tokens == expected.completion_tokens
    assert found.usage.total_tokens == expected.prompt_tokens + expected.completion_tokens
    cut = client.chat.completions.create(model="digits", messages=_messages(), temperature=0, max_tokens=2)
    assert cut.choices[0].finish_reason == "length" and cut.usage.completion_tokens == 2
    stopped = client.chat.completions.create(model="digits", messages=_messages(), temperature=0, stop=["6 9", "zzz"])
    assert stopped.choices[0].message.content == "8 " and stopped.choices[0].finish_reason == "stop"


def test_a_stream(client):
    stream = client.chat.completions.create(
        model="digits", messages=_messages(), temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "8 6 9"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage.completion_tokens > 1 and len([c for c in chunks if c.choices]) > 3


def test_a_conversation_with_a_system_prompt(client):
    messages = [
        {"role": "developer", "content": "Read."},
        *_messages(),
        {"role": "assistant", "content": "8 6 9"},
        {"role": "user", "content": "Again."},
    ]
    assert client.chat.completions.create(model="digits", messages=messages, max_tokens=4).usage.prompt_tokens > 30


def test_seeds(client):
    def sample(seed):
        return (
            client.chat.completions.create(
                model="digits", messages=_messages("x", None), temperature=30, seed=seed, max_tokens=12
            )
            .choices[0]
            .message.content
        )

    assert sample(1) == sample(1) != sample(2)


def test_sixteen_at_once(served, loaded):
    """Each gets its own answer, some of them in one batch."""
    questions = [q for q in scenes.held_out_questions(120) if q.kind == "read"][:16]
    sizes, generate = [], loaded.model.generate

    def counted(**inputs):
        sizes.append(len(inputs["input_ids"]))
        return generate(**inputs)

    async def ask_all():
        async with openai.AsyncOpenAI(
            base_url=f"http://127.0.0.1:{served[0]}/v1", api_key="x", max_retries=0
        ) as client:
            return await asyncio.gather(
                *(
                    client.chat.completions.create(
                        model="digits",
                        messages=_messages(q.question, _url(q.image)),
                        temperature=0,
                        max_tokens=2 + i % 5,
                    )
                    for i, q in enumerate(questions)
                )
            )

    loaded.model.generate = counted
    try:
        found = asyncio.run(ask_all())
    finally:
        del loaded.model.generate
    assert sum(sizes) == 16 and 1 < max(sizes) <= 4
    for i, (question, one) in enumerate(zip(questions, found, strict=True)):
        conversation = answers.Conversation.of(question.question, [question.image])
        expected, _ = answers.answer(
            loaded,
            answers.inputs_of(loaded, [conversation]),
            {"max_new_tokens": 2 + i % 5, "do_sample": False},
            lambda text: None,
        )
        assert one.choices[0].message.content == expected.text, question
        assert one.choices[0].finish_reason == expected.finish_reason
        assert one.usage.completion_tokens == expected.completion_tokens


def test_a_client_that_goes_frees_its_place(served, loaded):
    """While its answer is generated, as a stream and whole."""
    port, serving = served
    body = {"messages": _messages("x", None), "max_tokens": 64, "temperature": 0}
    running, went_on = threading.Event(), []
    row_put = engine_row().put

    def slow(self, token):
        running.set()
        went_on.append(token)
        time.sleep(0.1)
        row_put(self, token)

    for stream in (True, False):
        running.clear(), went_on.clear()
        engine_row().put = slow
        end = loaded.model.generation_config.eos_token_id
        loaded.model.generation_config.eos_token_id = [10**6]  # so that it would go on to the limit
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/chat/completions", json.dumps({**body, "stream": stream}), headers)
            assert running.wait(20)
            connection.close()
            deadline = time.monotonic() + 20
            before = -1
            while before != len(went_on) and time.monotonic() < deadline:
                before = len(went_on)
                time.sleep(0.4)
            assert len(went_on) < 40
        finally:
            engine_row().put = row_put
            loaded.model.generation_config.eos_token_id = end
    assert serving.waiting == 0


def engine_row():
    from qvl_model.serving import engine

    return engine._Row


def _bomb():
    stream = io.BytesIO()
    Image.new("1", (15000, 15000)).save(stream, "png")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"messages": []}, 400, "messages"),
        ({"messages": "x"}, 400, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "role"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, 400, "messages"),
        ({"messages": _messages(url="http://127.0.0.1:1/a.png")}, 400, "data: URLs"),
        ({"messages": _messages(url="file:///etc/passwd")}, 400, "data: URLs"),
        ({"messages": _messages(url="/etc/passwd")}, 400, "data: URLs"),
        ({"messages": _messages(url="data:image/png;base64,!!!")}, 400, "not base64"),
        ({"messages": _messages(url="data:image/png,abc")}, 400, "must be base64"),
        ({"messages": _messages(url="data:image/png;base64,AAAA")}, 400, "it is no image"),
        ({"messages": _messages(url=_bomb())}, 400, "million pixels"),
        ({"messages": _messages(url=_url(Image.new("1", (1001, 1000))))}, 400, "more than the 1000000"),
        ({"messages": _messages() * 3}, 400, "more than 2 images"),
        ({"messages": [{"role": "system", "content": _messages()[0]["content"]}]}, 400, "only users show images"),
        ({"messages": _messages("what is <|image_pad|>", None)}, 400, "image_pad"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "lone surrogate"),
        ({"model": "gpt-4o"}, 404, "'digits'"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"temperature": -1}, 400, "temperature"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"top_p": 2}, 400, "top_p"),
        ({"n": 2}, 400, "n"),
        ({"logprobs": True}, 400, "logprobs"),
        ({"tools": [{"type": "function"}]}, 400, "tools"),
        ({"frequency_penalty": 0.5}, 400, "frequency_penalty"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format"),
    ],
    ids=lambda value: str(value)[:50] if isinstance(value, dict | int) else "",
)
def test_what_is_refused(served, change, status, message):
    body = {"messages": _messages(), "max_tokens": 4, **change}
    for stream in (False, True):
        found, content = _post(served[0], json.dumps({**body, "stream": stream}))
        assert found == status and message in content["error"]["message"], content
        assert "Traceback" not in str(content) and len(content["error"]["message"]) < 400


def _post(port, body, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json", **headers})
    found = connection.getresponse()
    content = json.loads(found.read())
    connection.close()
    return found.status, content


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        ("{", {}, 400),
        ("[" * 100_000, {}, 400),
        ("[]", {}, 400),
        (b"\xff", {}, 400),
        ("{}", {"Content-Type": "text/plain"}, 415),
        (json.dumps({"messages": [{"role": "user", "content": "x" * (1 << 21)}]}), {}, 413),
    ],
)
def test_bodies_that_are_refused(served, body, headers, status):
    assert _post(served[0], body, **headers)[0] == status


def test_other_routes(client, served):
    assert [model.id for model in client.models.list().data] == ["digits"]
    connection = http.client.HTTPConnection("127.0.0.1", served[0], timeout=60)
    connection.request("GET", "/health")
    assert json.loads(connection.getresponse().read()) == {"status": "ok", "waiting": 0}
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    assert re.search(r'qvl_requests_total\{status="200"\} [1-9]', text) and "qvl_first_token_seconds_bucket" in text
    connection.request("GET", "/docs")
    assert connection.getresponse().status == 404


def test_a_full_queue_and_a_time_limit(loaded):
    """While the engine is held up."""
    serving, free = Engine(loaded, max_waiting=1, max_rows=1), threading.Event()
    generate = loaded.model.generate
    loaded.model.generate = lambda **inputs: (free.wait(30), generate(**inputs))[1]
    body = json.dumps({"messages": _messages(), "max_tokens": 2})
    try:
        with _running(build_app(serving, "digits", Limits(timeout=2.0))) as port:
            found = []
            threads = [threading.Thread(target=lambda: found.append(_post(port, body))) for _ in range(2)]
            threads[0].start()
            time.sleep(0.7)  # it is in work, the next one waits
            threads[1].start()
            time.sleep(0.7)
            status, content = _post(port, body)
            assert status == 429 and content["error"]["code"] == "queue_full"
            for thread in threads:
                thread.join()
            assert [status for status, _ in found] == [504, 504] and found[0][1]["error"]["code"] == "timeout"
            free.set()
            assert _post(port, body)[0] == 200
    finally:
        free.set()
        del loaded.model.generate


def test_an_api_key(loaded):
    with _running(build_app(Engine(loaded), "digits", Limits(api_key="secret"))) as port:
        for key, status in (("secret", 200), ("other", 401), ("", 401)):
            found, _ = _post(
                port, json.dumps({"messages": _messages(), "max_tokens": 1}), Authorization=f"Bearer {key}"
            )
            assert found == status


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "10.0.0.1", "169.254.169.254", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0", "224.0.0.1"],
)
def test_addresses_that_are_not_public_are_never_fetched(host):
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0.2)
    with pytest.raises(ValueError, match="is not public"):
        images.image_of(
            f"http://{host}:{listener.getsockname()[1]}/a.png", max_pixels=10**6, max_bytes=10**6, fetch=True
        )
    with pytest.raises(TimeoutError):
        listener.accept()
    listener.close()


def test_a_public_address_is_fetched(monkeypatch):
    """A server on loopback in the place of the public address that was checked."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers["Host"]))
            self.send_response(302 if self.path == "/away" else 200)
            self.end_headers()
            self.wfile.write(digits.SAMPLE.read_bytes())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(images, "_public_address", lambda host, port: "127.0.0.1")
    base = f"http://images.example:{server.server_port}"
    options = {"max_pixels": 10**6, "max_bytes": 10**6, "fetch": True}
    assert images.image_of(f"{base}/a.png?b=c", **options).size == Image.open(digits.SAMPLE).size
    assert asked == [("/a.png?b=c", f"images.example:{server.server_port}")]
    with pytest.raises(ValueError, match="status 302"):
        images.image_of(f"{base}/away", **options)
    with pytest.raises(ValueError, match="more than 100 bytes"):
        images.image_of(f"{base}/a.png", **{**options, "max_bytes": 100})
    server.shutdown()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command(number):
    process = subprocess.Popen(
        [sys.executable, "-m", "qvl_model.cli", "serve", "--port", "0", "--weights", "int8"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    try:
        line = process.stderr.readline()
        url = re.search(r"digits on (http://127\.0\.0\.1:\d+/v1)", line)[1]
        with openai.OpenAI(base_url=url, api_key="none", max_retries=20) as client:
            found = client.chat.completions.create(model="digits", messages=_messages(), temperature=0)
        assert found.choices[0].message.content == "8 6 9"
        process.send_signal(number)
        assert (
            process.wait(20) in (0, 130, -signal.SIGTERM, -signal.SIGINT) and "Traceback" not in process.stderr.read()
        )
    finally:
        process.kill()
        process.stderr.close()
