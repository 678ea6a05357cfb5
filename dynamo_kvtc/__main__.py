"""``python -m dynamo_kvtc``, where no console script was installed."""

from dynamo_kvtc.cli import main

main()
