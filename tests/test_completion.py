"""Completion in the shell: installed by its own option, asked in a real bash."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BASH = shutil.which("bash")
ASK = """
ask() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); _batcher_completion batcher; echo "${COMPREPLY[*]}"; }
batcher --install-completion >/dev/null
source ~/.bashrc
complete -p batcher
ask batcher export x --to o
ask batcher plan ""
ask batcher verify ""
_TYPER_COMPLETE_ARGS="batcher ini" _BATCHER_COMPLETE=complete_zsh batcher
"""


@pytest.mark.skipif(BASH is None, reason="there is no bash here")
def test_the_shell_completes_choices_jobs_and_outputs(tmp_path: Path) -> None:
    """Choices, job files and folders that are outputs; zsh gets its commands."""
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "batcher"
    script.write_text(f"#!{sys.executable}\nfrom batcher.cli import main\nmain()\n")
    script.chmod(0o755)
    for name in ("a.toml", "b.txt", "jobs/tickets.toml", "out/one/job.toml", "out/two/job.toml", "with space.toml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "out" / "none").mkdir()
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    ended = subprocess.run(
        [str(BASH), "--norc", "-c", ASK],
        cwd=tmp_path,
        env={**os.environ, "HOME": str(tmp_path), "PATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    installed, choice, job, output, zsh = ended.stdout.splitlines()
    assert installed == "complete -o default -F _batcher_completion batcher"
    assert choice == "openai-batch"
    assert job.split() == ["a.toml", "jobs/tickets.toml"]
    assert output.split() == ["out/one", "out/two"]
    assert '"init"' in zsh
