"""What to do where there is no way to ONNX, in the words of whoever trained the model."""

WAYS_OUT = {
    "NMF": "Its transform solves a problem for each record; use TruncatedSVD or PCA.",
    "MiniBatchNMF": "Its transform solves a problem for each record; use TruncatedSVD or PCA.",
    "LatentDirichletAllocation": "Its transform iterates for each record; use TruncatedSVD.",
    "DictionaryLearning": "Its transform solves a problem for each record; use PCA.",
    "HashingVectorizer": "Hashes of words are not in ONNX; use TfidfVectorizer or CountVectorizer, with max_features.",
    "FeatureHasher": "Hashes are not in ONNX; use OneHotEncoder, with max_categories.",
    "LabelPropagation": "Fit a KNeighborsClassifier on the records and its transduction_.",
    "LabelSpreading": "Fit a KNeighborsClassifier on the records and its transduction_.",
    "Isomap": "Use PCA or KernelPCA.",
    "LocallyLinearEmbedding": "Use PCA or KernelPCA.",
    "FeatureAgglomeration": "Use PCA or SelectKBest.",
    "IsotonicRegression": "Use SplineTransformer and a linear model, or a decision tree.",
}
"""Class of an estimator -> the sentence that follows "has no ONNX converter"."""

HINTS = (
    ("sparse", "A step gives a sparse matrix: pass it sparse_output=False."),
    (
        "StringTensorType",
        "A step gets texts and numbers in one table: put all steps of a column into one pipeline in ColumnTransformer.",
    ),
    ("strip_accents", "Strip the accents before the pipeline, in training and in scoring."),
)
"""A part of what a converter of skl2onnx says -> the way out."""


def way_out(step: str) -> str:
    """What to do about a step without a converter."""
    if step in WAYS_OUT:
        return WAYS_OUT[step]
    return (
        "Replace that step, or register a converter before you call convert: "
        f"skl2onnx.update_registered_converter({step}, ...); on the command line --converters MODULE."
    )


def hint(message: str) -> str:
    """The way out that fits a message of skl2onnx; empty when none is known."""
    return next((f" {way}" for part, way in HINTS if part in message), "")
