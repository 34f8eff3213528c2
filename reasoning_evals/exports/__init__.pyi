from reasoning_evals.exports.inspect_log import export_inspect as export_inspect
from reasoning_evals.exports.lm_eval import export_lm_eval as export_lm_eval
from reasoning_evals.exports.parquet import export_parquet as export_parquet
