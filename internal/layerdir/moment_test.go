package layerdir

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestMoment(t *testing.T) {
	now := Now()
	if now == (Moment{}) {
		require.Zero(t, now.Reliable())
		t.Skip("no clock that nobody sets on this system")
	}
	require.Equal(t, now.Time, now.Reliable())

	back := now // made before the clock was set back by an hour
	back.Time = back.Time.Add(time.Hour)
	require.Zero(t, back.Reliable())

	boot := now
	boot.Boot = "an earlier one"
	require.Zero(t, boot.Reliable())
	require.Zero(t, Moment{}.Reliable())
}
