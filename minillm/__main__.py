"""`python -m minillm`: the same as the `minillm` command."""

from __future__ import annotations

from minillm.cli import main

if __name__ == "__main__":
    main()
