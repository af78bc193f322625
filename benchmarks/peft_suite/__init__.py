"""PEFT's own tests on adapters that cntlora initialised: `python benchmarks/peft_suite PATH`."""
