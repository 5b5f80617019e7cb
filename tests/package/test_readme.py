"""What README.md shows runs as it stands there."""

import re
from pathlib import Path

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_examples_run_in_order(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    exec(compile("\n".join(blocks), "README.md", "exec"), {})
    before, after = map(float, re.search(r"mAP (\S+) -> (\S+),", capsys.readouterr().out).groups())
    assert before < after


def test_every_name_of_the_table_exists():
    import fastcompat as fc

    names = re.findall(r"`fc\.([\w.]+)", README)
    assert len(set(names)) > 8
    for name in names:
        target = fc
        for part in name.split("."):
            target = getattr(target, part)
