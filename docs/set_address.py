"""Write the address of this repository into the README and the notebooks: `python docs/set_address.py`.

The address is that of `git remote get-url origin`. setup.cfg keeps it, so that a later run can replace it.
"""

import re
import subprocess
from pathlib import Path


ROOT = Path(__file__).parent.parent
UNKNOWN = "<address of this repository>"


def web_address(remote: str) -> str:
    """Return the https address of a git remote, without a user, a token or a final .git."""
    host, path = re.fullmatch(r"(?:\w+://)?(?:[^@/]*@)?([^/:]+)(?::\d+/|[:/])(.+?)(?:\.git)?/?", remote).groups()
    return f"https://{host}/{path}"


def write_address(root: Path, address: str) -> list[Path]:
    """Replace the address in the files below `root` by `address`. Return the files that changed."""
    setup = root / "setup.cfg"
    known = re.search(r"^url = (\S+)$", setup.read_text(), re.MULTILINE)[1]
    changed = []
    for path in [setup, root / "README.md", *sorted(root.glob("notebooks/*.ipynb"))]:
        before = path.read_text()
        after = before.replace(known, address).replace(UNKNOWN, address)
        if after != before:
            path.write_text(after)
            changed.append(path)
    return changed


if __name__ == "__main__":
    remote = subprocess.run(
        ["git", "remote", "get-url", "origin"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    for path in write_address(ROOT, web_address(remote)):
        print(f"{path} has the address {web_address(remote)}.")
