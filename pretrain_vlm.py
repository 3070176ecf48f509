"""Entry point under the name that MindSpeed-MM's scripts use: supervised fine-tuning of a vision-language model."""

import sys

from mindspeed_mm.tasks.sft import main

if __name__ == "__main__":
    sys.exit(main())
