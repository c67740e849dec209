"""LiteLLM's proxy with answers that it makes up itself."""

import tempfile
from pathlib import Path

from compat.check import filled, killed_and_gone_on_with, listed, refused, write_job
from compat.serve import environment, free_port, serving

PACKAGES = ("litellm[proxy]==1.108.7",)
KEY = "sk-compat-litellm-1234"
ANSWER = "The answer is 42."
COUNTED = {"stream_options": {"include_usage": True}}
"""Without it this server, as OpenAI's own, tells no usage in a stream."""
CONFIG = f"""
model_list:
  - model_name: mock
    litellm_params: {{model: openai/mock, api_key: none, mock_response: "{ANSWER}"}}
general_settings: {{master_key: {KEY}}}
"""


def run() -> None:
    """Chat with and without streaming, completions; an unknown model and a wrong key."""
    tools = environment("litellm", PACKAGES)
    port = free_port()
    url = f"http://127.0.0.1:{port}/v1"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "config.yaml").write_text(CONFIG)
        command = [str(tools / "litellm"), "--config", "config.yaml", "--host", "127.0.0.1", "--port", str(port)]
        # Without this it fetches a price list from elsewhere when it starts.
        with serving("litellm", command, folder, f"{url}/models", {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}):
            print(f"litellm: {', '.join(PACKAGES)}", flush=True)
            assert [model["id"] for model in listed(url, KEY)] == ["mock"]
            chat = write_job(folder, "chat", url, {"model": "mock", "max_completion_tokens": 16, "temperature": 0})
            streamed = write_job(folder, "chat-streamed", url, {"model": "mock", "stream": True, **COUNTED})
            completions = write_job(folder, "completions", url, {"endpoint": "completions", "model": "mock"})
            for job in (chat, streamed, completions):
                answers = killed_and_gone_on_with(job, KEY)
                assert set(answers["response"].to_pylist()) == {ANSWER}
                filled(answers, "finish_reason", "response_id", "prompt_tokens", "completion_tokens", "total_tokens")
                if job is streamed:
                    filled(answers, "time_to_first_token")
            refused(chat, KEY, {"request.model": "mick"}, "no model mick; did you mean mock?")
            refused(chat, "sk-another-key-5678", {}, "refused")
