"""A process that races others: for each line of standard input, one conditional write and one line of outcome.

python -m tests.clients.racer URL KEY NAME; each line is `new KEY`, or `swap ETAG`.
"""

import sys

from tasks.clients.object_store import open_store
from tasks.errors import Conflict


def race(url: str, key: str, name: str) -> None:
    store = open_store(url)
    store.exists(key)  # connections and imports before the race, not in it
    print("ready", flush=True)
    for number, line in enumerate(sys.stdin):
        verb, argument = line.split(maxsplit=1)
        data = f"{name} {number}".encode()
        if verb == "new":
            print("won" if store.put_if_absent(argument.strip(), data) else "lost", flush=True)
        else:
            try:
                store.swap(key, data, argument.strip())
                print("won", flush=True)
            except Conflict:
                print("lost", flush=True)


if __name__ == "__main__":
    race(*sys.argv[1:])
