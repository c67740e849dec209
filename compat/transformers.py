"""`transformers serve` with a tiny model of random weights, which is made here."""

import subprocess
import tempfile
from pathlib import Path

from compat.check import filled, killed_and_gone_on_with, listed, write_job
from compat.serve import environment, free_port, serving

PACKAGES = ("torch==2.13.0", "transformers[serving]==5.24.0")
KEY = "any-key-will-do"
MODEL = "tiny"
MAKE = """
import sys
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

special = ["<|start|>", "<|end|>", "<|unknown|>"]
vocabulary = {token: number for number, token in enumerate([*special, "Ġ", "Ċ", *map(chr, range(33, 127))])}
tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<|unknown|>"))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
whole = PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, bos_token="<|start|>", eos_token="<|end|>", pad_token="<|end|>", unk_token="<|unknown|>"
)
whole.chat_template = (
    "{% for message in messages %}<|start|>{{ message['role'] }}: {{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant: {% endif %}"
)
torch.manual_seed(7)
config = LlamaConfig(
    vocab_size=len(vocabulary), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=1024, bos_token_id=0, eos_token_id=1, pad_token_id=1,
)
LlamaForCausalLM(config).save_pretrained(sys.argv[1])
whole.save_pretrained(sys.argv[1])
"""


def run() -> None:
    """Chat with and without streaming: the same texts both ways; completions; a model that is not there."""
    tools = environment("transformers", PACKAGES)
    port = free_port()
    url = f"http://127.0.0.1:{port}/v1"
    alone = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}  # threads only get into each other's way on a small machine
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        subprocess.run([str(tools / "python"), "-c", MAKE, MODEL], cwd=folder, check=True, capture_output=True)
        place = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
        command = [str(tools / "transformers"), "serve", MODEL, *place]
        with serving("transformers", command, folder, f"{url}/models", alone):
            print(f"transformers serve: {', '.join(PACKAGES)}", flush=True)
            (name,) = (model["id"] for model in listed(url, KEY))
            request = {"model": name, "max_tokens": 12, "temperature": 0, "seed": 1}
            plain = killed_and_gone_on_with(write_job(folder, "chat", url, request), KEY)
            streamed = killed_and_gone_on_with(
                write_job(folder, "chat-streamed", url, {**request, "stream": True}), KEY
            )
            for answers in (plain, streamed):
                filled(answers, "response", "finish_reason", "prompt_tokens", "completion_tokens", "total_tokens")
            filled(streamed, "time_to_first_token")
            for column in ("response", "finish_reason", "prompt_tokens", "completion_tokens"):
                assert plain[column].equals(streamed[column]), f"{column} differs when streamed"
            completions = {**request, "endpoint": "completions"}
            filled(killed_and_gone_on_with(write_job(folder, "completions", url, completions), KEY), "response")
