package sys

import (
	"encoding/json"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestByteStrings(t *testing.T) {
	type plain struct{ Argv [][]byte }
	type typed struct{ Argv ByteStrings }
	for _, tt := range []struct {
		plain [][]byte
		typed ByteStrings
	}{
		{nil, nil},
		{[][]byte{[]byte("")}, ByteStrings{""}},
		{[][]byte{[]byte("/bin/a b"), []byte("\xff\x00\n"), []byte("\u2028")}, ByteStrings{"/bin/a b", "\xff\x00\n", "\u2028"}},
	} {
		want, err := json.Marshal(plain{tt.plain})
		require.NoError(t, err)
		got, err := json.Marshal(typed{tt.typed})
		require.NoError(t, err)
		require.Equal(t, string(want), string(got))
		back := typed{ByteStrings{"other"}}
		require.NoError(t, json.Unmarshal(want, &back))
		require.Equal(t, tt.typed, back.Argv)
	}
	var s ByteStrings
	require.NoError(t, json.Unmarshal([]byte("[]"), &s))
	require.Nil(t, s)
	require.Error(t, json.Unmarshal([]byte(`["no base64!"]`), &s))
}
