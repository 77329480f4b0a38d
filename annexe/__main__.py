"""``python -m annexe``: the `annexe` command."""

from annexe.cli import main

if __name__ == "__main__":
    main()
