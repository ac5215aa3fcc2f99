"""`python -m lora_drop_vllm.cli`."""

import sys

from lora_drop_vllm.cli import main

sys.exit(main())
