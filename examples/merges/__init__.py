"""Which merge of a half-upgraded gallery to take: every merge on every pair of models at hand."""
