package layerdir

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestMoment(t *testing.T) {
	d := mustOpen(t, t.TempDir())
	now := d.Now()
	if now == (Moment{}) {
		require.Zero(t, d.Reliable(now))
		t.Skip("no clock that nobody sets on this system")
	}
	require.Equal(t, now.Time, d.Reliable(now))

	back := now // made before the clock was set back by an hour
	back.Time = back.Time.Add(time.Hour)
	require.Zero(t, d.Reliable(back))

	boot := now
	boot.Boot = "an earlier one"
	require.Zero(t, d.Reliable(boot))
	require.Zero(t, d.Reliable(Moment{}))
}
