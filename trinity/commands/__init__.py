"""One file per command of `trinity`. Each imports what it needs when it runs, so that `trinity --help` is quick."""
