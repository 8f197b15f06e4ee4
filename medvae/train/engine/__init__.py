"""The book-keeping engine: per-patient gradients at about the cost of a plain step.

A custom autograd Function a layer hands back the input gradient alone and writes (input, output gradient) into a book.
The book takes each patient's weight gradient by the cheapest way known for the layer's shape, clips by the joint norm
and sums. The idea is book-keeping (Bu et al. 2022, "Differentially private optimization on large model at small
cost"); the unit here is the patient, whose scans are one segment of the batch.
"""
