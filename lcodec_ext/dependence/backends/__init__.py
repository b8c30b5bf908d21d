"""The executions of the dependence measures: reference, CPU, CUDA."""
