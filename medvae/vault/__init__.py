"""The only room that reads private data: readers, patient grouping, preprocessing, the cohort store."""
