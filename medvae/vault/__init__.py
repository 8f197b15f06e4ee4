"""The only room that reads private data: finding, decoding, grouping by patient, preprocessing, storing."""
