#define PIECES kPiecesAvx512
#include "pieces.inl"
