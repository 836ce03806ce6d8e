"""`python -m gspn_dit.ops`: the backends of `propagate` on this machine, and for one that is missing, why."""

from gspn_dit.ops.backends import BACKENDS, status


def main() -> None:
    """Print one line a backend."""
    for name in BACKENDS:
        available, detail = status(name)
        print(f"{name:<10} {'available' if available else 'not available':<14} {detail}")


if __name__ == "__main__":
    main()
