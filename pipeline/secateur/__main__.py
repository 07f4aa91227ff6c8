"""``secateur``, and ``python -m secateur``."""


def main() -> None:
    """Run the command line; Ctrl-C is no traceback, not even while it is being loaded."""
    try:
        from secateur.cli.app import main as run

        run()
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
