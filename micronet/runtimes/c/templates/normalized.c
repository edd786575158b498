
#ifdef MICRONET_NORMALIZED
$kernel
int micronet_predict_normalized(const float *image, micronet_score *scores)
{
    if (!image || !scores)
        return MICRONET_NULL;
    $first_call
    predict_scores(scores);
    return MICRONET_OK;
}
#endif
