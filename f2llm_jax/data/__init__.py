"""From raw parquet to tokenised records on disk. Knows texts and rows; knows no model."""
