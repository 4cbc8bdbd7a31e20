"""Imports go one way, and the package works where Triton is missing."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Each room may import those before it; `data` and `callbacks` are imported by configurations alone.
ORDER = [
    "spec",
    "ops.launch",
    "ops.totals",
    "ops.backend",
    "ops.entrance",
    "ops.ssd.reference",
    "ops.ssd.chunked",
    "ops.ssd.kernels",
    "ops.ssd.binding",
    "ops.ssd.api",
    "ops",
    "nn",
    "models",
    "tasks",
    "explain",
]


def room(module: str) -> int | None:
    """Position of the longest matching room; None for modules outside the order."""
    found = [name for name in ORDER if module == f"bimamba.{name}" or module.startswith(f"bimamba.{name}.")]
    return ORDER.index(max(found, key=len)) if found else None


def imports(path: Path, module: str) -> list[str]:
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
            origin = f"{base}.{node.module}" if node.level and node.module else (base if node.level else node.module)
            names += [f"{origin}.{alias.name}" for alias in node.names]
    return [n for n in names if n.startswith("bimamba.")]


def test_imports_go_one_way():
    wrong = []
    for path in (ROOT / "bimamba").rglob("*.py"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        own = room(module)
        for name in imports(path, module):
            if own is not None and (other := room(name)) is not None and other > own:
                wrong.append(f"{module} imports {name}")
            for leaf in ("data", "callbacks"):
                if name.startswith(f"bimamba.{leaf}") and not module.startswith(f"bimamba.{leaf}"):
                    wrong.append(f"{module} imports {name}")
    assert not wrong, wrong


def test_works_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, bimamba\n"
        "from bimamba.nn import BiMamba2\n"
        "print(BiMamba2(8, headdim=4)(torch.randn(1, 5, 8)).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([1, 5, 8])" in done.stdout
