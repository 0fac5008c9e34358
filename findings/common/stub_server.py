"""A stand-in server for the scripts beside this folder: it keeps what a client sends, and answers as it is made to."""

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

USAGE = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}


def serve(answer):
    """Start a server on a free port of this machine.

    Args:
        answer: from path and body (None for GET) to the JSON object of the reply.

    Returns:
        the address of the server, and the list that the bodies of its POST requests go to.
    """
    arrived = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.reply(answer(self.path, None))

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            arrived.append(body)
            self.reply(answer(self.path, body))

        def reply(self, fields):
            content = json.dumps(fields).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}", arrived


def chat(path, body):
    """The reply of a chat server that says yes, or of one of bare texts."""
    is_chat = path.endswith("/chat/completions")
    said = {"message": {"role": "assistant", "content": "yes"}} if is_chat else {"text": "yes"}
    kind = "chat.completion" if is_chat else "text_completion"
    choice = {"index": 0, "finish_reason": "stop", **said}
    return {"id": "1", "object": kind, "created": 1, "model": "m", "choices": [choice], "usage": USAGE}
